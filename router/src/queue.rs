//! The line in front of full workers: by priority and then in order of arrival, one for each model,
//! bounded over all.
//!
//! When a place comes free somewhere the first in line tries to get it, two where two came free,
//! and so on; nobody holds the others up while a worker is being asked. From how often places come
//! free follows how long a newcomer would wait. What is longer than the limit, or than the
//! request's own, is told at once. Where the line is full, the last of a lower priority makes room.
//! An answer that has begun is not given up for want of a place.

use crate::{
    RouterError,
    config::Deadlines,
    placement::Order,
    upstream::Upstream,
    version::{Model, Version},
};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

/// What a refused client is told to wait where nothing better is known.
const RETRY_AFTER: Duration = Duration::from_secs(2);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);
/// Between two tries of the first in line, unless a place of this router's own comes free earlier.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// While nothing is known of how often places come free, so many may wait for each that there is.
const LINE_PER_PLACE: usize = 2;
/// Freed places that the rate is measured by: at least, and at most.
const MEASURED: (usize, usize) = (4, 64);

/// In order: sequences that were under way before (false), then newcomers; those by priority, the
/// lowest first; all by arrival.
type Key = (bool, i32, u64);

/// What a request may ask of the line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    /// The lowest goes first.
    pub priority: i32,
    /// When its first token comes too late.
    pub until: Instant,
}

/// Those who wait for a place on the workers of one model.
#[derive(Default)]
pub(crate) struct Line(Mutex<State>);

#[derive(Default)]
struct State {
    arrivals: u64,
    waiting: BTreeMap<Key, Waiter>,
    /// When the line formed, or the oldest of `freed` that is left.
    measured_since: Option<Instant>,
    /// When places came free since then.
    freed: VecDeque<Instant>,
    /// Seconds between two, as last measured.
    each: Option<f64>,
}

struct Waiter {
    wake: Arc<Notify>,
    /// It asks the workers now.
    tries: bool,
}

impl State {
    fn place_freed(&mut self, now: Instant) {
        if self.waiting.is_empty() {
            return;
        }
        if self.freed.len() == MEASURED.1 {
            self.measured_since = self.freed.pop_front();
        }
        self.freed.push_back(now);
        if self.freed.len() >= MEASURED.0 {
            self.each = self.measured(now);
        }
        self.wake_next();
    }

    /// Seconds between two places that came free.
    fn measured(&self, now: Instant) -> Option<f64> {
        let elapsed = now.saturating_duration_since(self.measured_since?);
        Some(elapsed.as_secs_f64() / self.freed.len().max(1) as f64)
    }

    /// Lets the next one try.
    fn wake_next(&mut self) {
        let idle = self.waiting.values_mut().find(|waiter| !waiter.tries);
        if let Some(waiter) = idle {
            waiter.tries = true;
            waiter.wake.notify_one();
        } else if let Some(first) = self.waiting.values().next() {
            // It tries again in case its question came too early.
            first.wake.notify_one();
        }
    }

    /// How long one more would wait behind `ahead` others, by this line or the one before; `None`
    /// before enough is known.
    fn expected_wait(&self, now: Instant, patience: Duration, ahead: usize) -> Option<Duration> {
        // Whoever is refused measures nothing: were the first in line refused for what an earlier
        // line has left, all after it would be, too.
        if self.waiting.is_empty() {
            return None;
        }
        let since = self.measured_since.map(|since| now.saturating_duration_since(since));
        let enough = self.freed.len() >= MEASURED.0 || since.is_some_and(|since| since >= patience);
        let each = if enough { self.measured(now) } else { self.each };
        Duration::try_from_secs_f64(each? * (ahead + 1) as f64).ok()
    }

    /// Takes the last newcomer of a lower priority out of the line; whether there was one.
    fn make_room(&mut self, priority: i32) -> bool {
        match self.waiting.last_key_value() {
            Some((&last @ (true, other, _), waiter)) if other > priority => {
                waiter.wake.notify_one();
                self.waiting.remove(&last);
                true
            }
            _ => false,
        }
    }
}

impl Line {
    /// Whether others wait, so that a newcomer belongs behind them.
    pub fn is_empty(&self) -> bool {
        self.state().waiting.is_empty()
    }

    /// A place came free on some worker of the model.
    pub fn place_freed(&self) {
        self.state().place_freed(Instant::now());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the line, given up when dropped.
pub(crate) struct Ticket {
    upstream: Arc<Upstream>,
    model: Arc<Model>,
    key: Key,
    wake: Arc<Notify>,
    entered: Instant,
}

impl Ticket {
    /// Joins the line; a sequence that was `under_way` before goes to its front, and is never
    /// refused. Errors: `Overloaded` when the line is full, or too long for the queue deadline or
    /// for the request's own limit.
    pub fn take(
        upstream: &Arc<Upstream>,
        order: &Order<'_>,
        under_way: bool,
    ) -> Result<Self, RouterError> {
        let (model, Standing { priority, until }) = (order.model, order.standing);
        let now = Instant::now();
        let mut state = model.line.state();
        let key = (!under_way, if under_way { 0 } else { priority }, state.arrivals + 1);
        if !under_way {
            let ahead = state.waiting.range(..key).count();
            let wait = state.expected_wait(now, upstream.deadlines.queue, ahead);
            check_wait(upstream, model, ahead, wait, until.saturating_duration_since(now))?;
            let max = upstream.limits.queue_max;
            if upstream.queued.load(Ordering::Relaxed) >= max {
                if !state.make_room(priority) {
                    let full = format!("{max} choices wait for a place already");
                    return Err(overloaded(&full, wait));
                }
                upstream.left_line();
            }
        }
        if state.waiting.is_empty() {
            state.freed.clear();
            state.measured_since = Some(now);
        }
        upstream.queued.fetch_add(1, Ordering::Relaxed);
        upstream.metrics.queued.inc();
        state.arrivals += 1;
        let wake = Arc::new(Notify::new());
        state.waiting.insert(key, Waiter { wake: wake.clone(), tries: false });
        drop(state);
        Ok(Self { upstream: upstream.clone(), model: model.clone(), key, wake, entered: now })
    }

    /// Waits for the turn to try: a place came free, or this is the first and it is time to look.
    /// Errors: `Overloaded` when no place at all came free for as long as the queue deadline, or as
    /// the one for loading where the sequence was under way.
    pub async fn turn(&self) -> Result<(), RouterError> {
        let mut changes = self.upstream.targets.changes();
        let Deadlines { queue, loading, .. } = self.upstream.deadlines;
        let (newcomer, ..) = self.key;
        let patience = if newcomer { queue } else { loading.max(queue) };
        loop {
            let woken = tokio::select! {
                () = self.wake.notified() => true,
                () = changes.next() => false,
                () = sleep(LOOK_AGAIN.min(patience)) => false,
            };
            let mut state = self.model.line.state();
            let moved = state.freed.back().map_or(self.entered, |&freed| freed.max(self.entered));
            if moved.elapsed() >= patience {
                let ahead = state.waiting.range(..self.key).count();
                let wait = state.expected_wait(Instant::now(), patience, ahead);
                let stuck =
                    format!("no place on a worker of '{}' for {patience:?}", self.model.name);
                return Err(overloaded(&stuck, wait));
            }
            let first = state.waiting.keys().next() == Some(&self.key);
            let Some(waiter) = state.waiting.get_mut(&self.key) else {
                return Err(overloaded("the line is full, and others go first", None));
            };
            if woken || first {
                waiter.tries = true;
                return Ok(());
            }
        }
    }

    /// Every worker was still full: on with the wait.
    pub fn stay(&self) {
        if let Some(waiter) = self.model.line.state().waiting.get_mut(&self.key) {
            waiter.tries = false;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.model.line.state();
        if state.waiting.remove(&self.key).is_some() {
            self.upstream.left_line();
        }
        // Where this one got a place there may be another; where it gave up, its turn is free.
        state.wake_next();
    }
}

/// Whether a newcomer behind `ahead` others, whose `wait` is known or not, may hope for a place
/// within the queue deadline and what is `left` of its own time.
fn check_wait(
    upstream: &Upstream,
    model: &Model,
    ahead: usize,
    wait: Option<Duration>,
    left: Duration,
) -> Result<(), RouterError> {
    let patience = upstream.deadlines.queue;
    if let Some(wait) = wait.filter(|&wait| wait > patience.min(left)) {
        let (seconds, left) = (wait.as_secs_f64().ceil(), left.as_secs_f64());
        let mut long = format!(
            "{ahead} choices wait before this for a place on a worker of '{}', about {seconds} s",
            model.name
        );
        if wait <= patience {
            long += &format!(", and the request's own limit leaves {left:.1} s");
        }
        return Err(overloaded(&long, Some(wait)));
    }
    let places = upstream.targets.now().version(model).map_or(0, Version::places);
    if wait.is_none() && places > 0 && ahead >= LINE_PER_PLACE * places {
        let long = format!(
            "{ahead} choices wait for one of the {places} places on workers of '{}'",
            model.name
        );
        return Err(overloaded(&long, None));
    }
    Ok(())
}

/// Refused for now; `wait` is how long it would have taken.
pub(crate) fn overloaded(reason: &str, wait: Option<Duration>) -> RouterError {
    let retry_after = wait.unwrap_or(RETRY_AFTER).clamp(Duration::from_secs(1), RETRY_AFTER_MAX);
    // Whole seconds are what HTTP can say.
    let retry_after = Duration::from_secs(retry_after.as_secs_f64().ceil() as u64);
    RouterError::Overloaded { reason: reason.to_owned(), retry_after }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn line(start: Instant, waiting: u64) -> State {
        let waiter = |at| ((true, 0, at), Waiter { wake: Arc::new(Notify::new()), tries: false });
        let waiting = (0..waiting).map(waiter).collect();
        State { waiting, measured_since: Some(start), ..State::default() }
    }

    #[test]
    fn the_wait_follows_from_how_often_places_come_free() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut line = line(start, 9);
        for at in [2, 4, 6] {
            line.place_freed(after(at));
            assert_eq!(line.expected_wait(after(at), PATIENCE, 9), None, "too little is known");
        }
        line.place_freed(after(8));
        let wait = |at| line.expected_wait(after(at), PATIENCE, 9);
        assert_eq!(wait(8), Some(Duration::from_secs(20)), "ten places, one every 2 s");
        assert_eq!(wait(16), Some(Duration::from_secs(40)), "it has become slower");
        // The next line begins with what this one knew.
        line.freed.clear();
        line.measured_since = Some(after(100));
        let wait = line.expected_wait(after(101), PATIENCE, 9);
        assert_eq!(wait, Some(Duration::from_secs(20)), "as last measured");
    }

    #[test]
    fn only_the_latest_places_are_measured() {
        let start = Instant::now();
        let mut line = line(start, 1);
        for at in 1..=100 {
            line.place_freed(start + Duration::from_secs(at));
        }
        line.place_freed(start + Duration::from_secs(100));
        assert_eq!(line.freed.len(), MEASURED.1);
        let wait = line.expected_wait(start + Duration::from_secs(100), PATIENCE, 1).unwrap();
        assert!((1.9..2.1).contains(&wait.as_secs_f64()), "{wait:?}");
    }

    #[test]
    fn where_nothing_comes_free_the_wait_is_long() {
        let start = Instant::now();
        let line = line(start, 1);
        assert_eq!(line.expected_wait(start, PATIENCE, 1), None);
        let expected = line.expected_wait(start + PATIENCE, PATIENCE, 1).unwrap();
        assert!(expected >= 2 * PATIENCE, "{expected:?}");
        assert_eq!(State::default().expected_wait(start, PATIENCE, 0), None, "no line");
    }

    #[test]
    fn a_line_that_is_over_refuses_nobody() {
        let start = Instant::now();
        let mut few = line(start, 1);
        few.place_freed(start + Duration::from_secs(1));
        let mut slow = line(start, 1);
        (1..=4).for_each(|at| slow.place_freed(start + at * PATIENCE * 2));
        for mut line in [few, slow] {
            let later = start + PATIENCE * 100;
            let wait = line.expected_wait(later, PATIENCE, 1);
            assert!(wait.is_some_and(|wait| wait > PATIENCE), "while it is there: {wait:?}");
            line.waiting.clear();
            assert_eq!(line.expected_wait(later, PATIENCE, 0), None);
        }
    }

    #[test]
    fn as_many_try_as_places_came_free() {
        let now = Instant::now();
        let mut line = line(now, 3);
        let first = Waiter { wake: Arc::new(Notify::new()), tries: false };
        line.waiting.insert((false, 0, 9), first);
        let trying = |line: &State| -> Vec<Key> {
            line.waiting.iter().filter(|(_, waiter)| waiter.tries).map(|(&key, _)| key).collect()
        };
        line.place_freed(now);
        assert_eq!(trying(&line), [(false, 0, 9)], "what was under way goes first");
        line.place_freed(now);
        assert_eq!(trying(&line), [(false, 0, 9), (true, 0, 0)]);
    }

    #[test]
    fn the_last_of_a_lower_priority_makes_room() {
        let mut line = line(Instant::now(), 2);
        let waiter = || Waiter { wake: Arc::new(Notify::new()), tries: false };
        line.waiting.insert((true, -5, 8), waiter());
        line.waiting.insert((false, 0, 9), waiter());
        assert!(!line.make_room(0), "none is lower");
        assert!(line.make_room(-1) && line.make_room(-1));
        let left: Vec<Key> = line.waiting.keys().copied().collect();
        assert_eq!(left, [(false, 0, 9), (true, -5, 8)]);
        assert!(line.make_room(i32::MIN) && !line.make_room(i32::MIN), "never what was under way");
    }
}
