//! Several threads read what one thread takes, in order, with a bound on what is held meanwhile.
//!
//! Errors come in order too: what lies before a failed read is handed out first, and nothing behind
//! it is begun. No thread outlives the call: it ends once those that read have ended.

use std::{
    collections::BTreeMap,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use kernels::WeightPart;

use crate::ModelError;

/// How often who waits for a read tells that it still waits.
const TICK: Duration = Duration::from_secs(1);

/// How much is read ahead.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Threads that read.
    pub readers: usize,
    /// Bytes that are being read, wait to be taken, or were taken last. What is taken next is read
    /// whatever its size.
    pub bytes: u64,
}

/// How a rank's weights are read ahead of their upload. Of 72B the largest two take 1.5 GB.
pub(super) const AHEAD: Bounds = Bounds { readers: 4, bytes: 1 << 30 };

/// What a rank uploads as one weight, read ahead.
pub(crate) type Weights<'a> = Taker<'a, Vec<WeightPart<'static>>>;

/// What is to be read, of sizes known before, and how far that is.
struct Ahead<T> {
    sizes: Vec<u64>,
    bounds: Bounds,
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    /// The first that nobody has begun to read.
    next: usize,
    taken: usize,
    /// Bytes that are being read, wait, or were taken last.
    held: u64,
    read_bytes: u64,
    waiting: BTreeMap<usize, Result<T, ModelError>>,
    /// Nothing more is to be read.
    stopped: bool,
}

/// Takes what was read, in order.
pub(crate) struct Taker<'a, T>(&'a Ahead<T>);

/// Calls `read` for each of `sizes`, on several threads, while `take` takes the results.
///
/// # Errors
/// What `take` says; it hears what `read` says where it takes. `Options` where no thread starts.
pub(super) fn read_ahead<T: Send, R>(
    sizes: Vec<u64>,
    bounds: Bounds,
    read: impl Fn(usize) -> Result<T, ModelError> + Sync,
    take: impl FnOnce(&Taker<'_, T>) -> Result<R, ModelError>,
) -> Result<R, ModelError> {
    let (readers, count) = (bounds.readers, sizes.len());
    let state = State {
        next: 0,
        taken: 0,
        held: 0,
        read_bytes: 0,
        waiting: BTreeMap::new(),
        stopped: false,
    };
    let ahead = Ahead { sizes, bounds, state: Mutex::new(state), changed: Condvar::new() };
    thread::scope(|scope| {
        // Dropped before the threads are waited for.
        let taker = Taker(&ahead);
        for _ in 0..readers.min(count) {
            let reader = thread::Builder::new().name("weights".into());
            reader.spawn_scoped(scope, || ahead.read(&read)).map_err(|error| {
                ModelError::Options(format!("cannot start a thread that reads weights: {error}"))
            })?;
        }
        take(&taker)
    })
}

impl<T> Ahead<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next to be read, once there is room for it; `None` at the end.
    fn begin(&self) -> Option<usize> {
        let mut state = self.state();
        loop {
            let at = state.next;
            let size = *self.sizes.get(at)?;
            if state.stopped {
                return None;
            }
            let fits = state.held.saturating_add(size) <= self.bounds.bytes;
            if fits || at <= state.taken {
                state.next += 1;
                state.held += size;
                return Some(at);
            }
            // Whoever takes something, or takes no more, wakes this.
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn read(&self, read: &impl Fn(usize) -> Result<T, ModelError>) {
        // A panic stops the others too, and whoever waits for what it was to read.
        let _on_panic = StopsOnPanic(self);
        while let Some(at) = self.begin() {
            let outcome = read(at);
            let mut state = self.state();
            match outcome {
                Ok(_) => state.read_bytes += self.sizes[at],
                // Nothing behind it is taken.
                Err(_) => state.next = self.sizes.len(),
            }
            state.waiting.insert(at, outcome);
            self.changed.notify_all();
        }
    }

    fn stop(&self) {
        self.state().stopped = true;
        self.changed.notify_all();
    }
}

impl<T> Taker<'_, T> {
    /// The next, which is no longer held once the one behind it is taken. `waits` is called each
    /// second until it is there.
    ///
    /// # Errors
    /// What reading it said; `Options` behind the last.
    pub(crate) fn take(&self, waits: &mut dyn FnMut(u64)) -> Result<T, ModelError> {
        let Self(ahead) = self;
        let mut state = ahead.state();
        let at = state.taken;
        if at > 0 {
            state.held -= ahead.sizes.get(at - 1).copied().unwrap_or_default();
        }
        state.taken += 1;
        // The next may be read now, whatever its size.
        ahead.changed.notify_all();
        loop {
            if let Some(outcome) = state.waiting.remove(&at) {
                return outcome;
            }
            if state.stopped || at >= ahead.sizes.len() {
                return Err(ModelError::Options(format!(
                    "weight {at} of {} is not read: its reader has ended",
                    ahead.sizes.len()
                )));
            }
            let (woken, timeout) =
                ahead.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            if timeout.timed_out() {
                let read = state.read_bytes;
                drop(state);
                waits(read);
                state = ahead.state();
            }
        }
    }

    /// Bytes read so far.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.0.state().read_bytes
    }
}

impl<T> Drop for Taker<'_, T> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

struct StopsOnPanic<'a, T>(&'a Ahead<T>);

impl<T> Drop for StopsOnPanic<'_, T> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        sync::{
            Barrier,
            atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
            mpsc,
        },
        time::Instant,
    };

    fn broken(at: usize) -> ModelError {
        ModelError::Checkpoint(format!("weight {at} is broken"))
    }

    /// Sizes that often fill the bound, and sometimes are above it.
    fn sizes() -> Vec<u64> {
        (0..200).map(|at| if at % 37 == 36 { 150 } else { 10 + at * 7 % 50 }).collect()
    }

    #[test]
    fn all_is_taken_in_order_and_no_more_is_held_than_the_bound() {
        for readers in [1, 2, 4, 9] {
            let bounds = Bounds { readers, bytes: 120 };
            let sizes = sizes();
            let (held, most) = (AtomicU64::new(0), AtomicU64::new(0));
            let read = |at: usize| {
                let now = held.fetch_add(sizes[at], SeqCst) + sizes[at];
                // What is next is read beside what was taken last, whatever they take.
                let pair = |at: usize| sizes.get(at..at + 2).map_or(0, |two| two[0] + two[1]);
                let most_here = bounds.bytes.max(pair(at)).max(pair(at.saturating_sub(1)));
                assert!(now <= most_here, "{now} at {at}, {readers} readers");
                most.fetch_max(now, SeqCst);
                Ok(at)
            };
            let all = read_ahead(sizes.clone(), bounds, read, |taker| {
                let mut all = Vec::new();
                // The first five are read, and fill the bound, before any is taken.
                let start = Instant::now();
                while most.load(SeqCst) < bounds.bytes {
                    assert!(start.elapsed() < Duration::from_secs(60), "nothing is read ahead");
                    thread::yield_now();
                }
                for (at, size) in sizes.iter().enumerate() {
                    all.push(taker.take(&mut |_| {})?);
                    // Counted as gone before the taker says so: never too late.
                    held.fetch_sub(*size, SeqCst);
                    assert!(taker.read_bytes() >= sizes[..=at].iter().sum());
                }
                assert!(taker.take(&mut |_| {}).is_err(), "there are no more");
                Ok(all)
            });
            assert_eq!(all.expect("all"), Vec::from_iter(0..sizes.len()));
        }
    }

    #[test]
    fn several_reads_are_in_flight_at_once() {
        let bounds = Bounds { readers: 4, bytes: 100 };
        // Ends only where all four have begun.
        let all = Barrier::new(4);
        let read = |at: usize| {
            all.wait();
            Ok(at)
        };
        let sum = read_ahead(vec![1; 8], bounds, read, |taker| {
            (0..8).try_fold(0, |sum, _| Ok(sum + taker.take(&mut |_| {})?))
        });
        assert_eq!(sum.expect("all"), 28);
    }

    #[test]
    fn the_first_error_is_heard_in_its_place_and_nothing_behind_it_is_begun() {
        for readers in [1, 4] {
            let begun = AtomicUsize::new(0);
            let read = |at: usize| {
                begun.fetch_max(at, SeqCst);
                if at % 10 == 5 { Err(broken(at)) } else { Ok(at) }
            };
            let bounds = Bounds { readers, bytes: 3 };
            let mut taken = 0;
            let outcome = read_ahead(vec![1; 1000], bounds, read, |taker| {
                loop {
                    assert_eq!(taker.take(&mut |_| {})?, taken);
                    taken += 1;
                }
            });
            let error: ModelError = match outcome {
                Ok(()) => unreachable!("the loop has no end"),
                Err(error) => error,
            };
            assert_eq!((taken, error.to_string()), (5, broken(5).to_string()));
            assert!(begun.load(SeqCst) <= 8, "{begun:?}");
        }
    }

    #[test]
    fn readers_stop_where_nothing_more_is_taken() {
        let begun = AtomicUsize::new(0);
        let read = |at: usize| {
            begun.fetch_max(at, SeqCst);
            Ok(at)
        };
        let bounds = Bounds { readers: 4, bytes: 5 };
        let outcome: Result<(), _> = read_ahead(vec![1; 1000], bounds, read, |taker| {
            taker.take(&mut |_| {})?;
            Err(ModelError::Options("the device failed".into()))
        });
        assert!(outcome.expect_err("the taker's").to_string().contains("the device failed"));
        assert!(begun.load(SeqCst) <= 5, "{begun:?}");
    }

    #[test]
    fn who_waits_for_a_slow_read_tells_that_it_waits() {
        let (go, gone) = mpsc::channel();
        let gone = Mutex::new(gone);
        let read = |at: usize| {
            if at == 1 {
                gone.lock().expect("one reader").recv().expect("a word");
            }
            Ok(at)
        };
        let bounds = Bounds { readers: 1, bytes: 5 };
        let told = read_ahead(vec![3; 2], bounds, read, |taker| {
            taker.take(&mut |_| {})?;
            let mut told = Vec::new();
            taker.take(&mut |read| {
                told.push(read);
                go.send(()).expect("a reader");
            })?;
            Ok(told)
        });
        assert_eq!(told.expect("all").first(), Some(&3));
    }

    #[test]
    fn a_reader_that_panics_leaves_nobody_waiting() {
        let bounds = Bounds { readers: 2, bytes: 5 };
        let read = |at: usize| if at == 2 { panic!("a reader's") } else { Ok(at) };
        let load = || {
            read_ahead(vec![1; 9], bounds, read, |taker| {
                (0..9).try_for_each(|_| taker.take(&mut |_| {}).map(drop))
            })
        };
        assert!(catch_unwind(AssertUnwindSafe(load)).is_err());
    }
}
