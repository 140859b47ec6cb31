//! Where the ranks of an epoch meet. A rank that is a process hears of each on its standard input,
//! says on its standard output that it has, and ends with its parent, who holds both.

use std::{
    fmt,
    io::{self, BufRead},
    net::SocketAddr,
    str::FromStr,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use cluster::telemetry;
use collective::Cut;

/// One epoch of a group. As a line: its parts with a space between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Of the group: another is refused.
    pub epoch: u64,
    /// Where rank 0 listens.
    pub leader: SocketAddr,
    /// The secret of the epoch, without spaces.
    pub token: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.epoch, self.leader, self.token)
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let wrong = || "a place is an epoch, an address and a secret".to_owned();
        let words: Vec<_> = line.split_whitespace().collect();
        let [epoch, leader, token] = words[..] else { return Err(wrong()) };
        let epoch = epoch.parse().map_err(|_| wrong())?;
        let leader = leader.parse().map_err(|_| wrong())?;
        Ok(Self { epoch, leader, token: token.to_owned() })
    }
}

/// What a rank says once it has heard of the place of an epoch.
pub(super) fn heard(epoch: u64) -> String {
    format!("heard of epoch {epoch}")
}

/// The epoch that a line says its rank has heard of.
pub(super) fn heard_of(line: &str) -> Option<u64> {
    line.trim_end().strip_prefix("heard of epoch ")?.parse().ok()
}

/// The places that this process's parent tells it: each ends the epoch before.
#[derive(Clone, Default)]
pub(super) struct Places(Arc<Told>);

#[derive(Default)]
struct Told {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The newest that was not asked for.
    next: Option<Place>,
    /// Of the epoch before.
    links: Vec<Cut>,
}

impl Places {
    /// Starts to listen. The process ends where its parent does, or says what is none.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn of_parent() -> io::Result<Self> {
        let places = Self::default();
        let told = places.clone();
        thread::Builder::new().name("parent".into()).spawn(move || told.listen())?;
        Ok(places)
    }

    /// The newest that was not asked for before; waits for one for up to `limit`.
    pub fn next(&self, limit: Duration) -> Option<Place> {
        let none = |state: &mut State| state.next.is_none();
        let waited = self.0.changed.wait_timeout_while(self.state(), limit, none);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.links.clear();
        state.next.take()
    }

    /// From the next place on, nobody waits on these links.
    pub fn end_links(&self, links: Cut) {
        let mut state = self.state();
        if state.next.is_some() {
            links.cut();
        }
        state.links.push(links);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self, place: Place) {
        let mut state = self.state();
        state.next = Some(place);
        state.links.drain(..).for_each(|links| links.cut());
        drop(state);
        self.0.changed.notify_all();
    }

    fn listen(&self) {
        for line in io::stdin().lock().lines() {
            let place = line.map_err(|error| error.to_string()).and_then(|line| line.parse());
            let place: Place = match place {
                Ok(place) => place,
                Err(reason) => {
                    tracing::error!(reason, "what the parent says is no place");
                    break;
                }
            };
            let epoch = place.epoch;
            self.told(place);
            println!("{}", heard(epoch));
        }
        // Nobody holds the other side: the parent is gone.
        telemetry::exit(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_arrives_as_it_was_told() {
        let leader = "[fe80::1]:7100".parse().unwrap();
        let place = Place { epoch: 7, leader, token: "0f".repeat(16) };
        assert_eq!(place.to_string().parse(), Ok(place));
        for wrong in ["", "1 127.0.0.1:1", "x 127.0.0.1:1 t", "1 here t", "1 127.0.0.1:1 t u"] {
            assert!(wrong.parse::<Place>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_newest_place_counts() {
        let place = |epoch| Place { epoch, leader: ([127, 0, 0, 1], 9).into(), token: "t".into() };
        let places = Places::default();
        assert_eq!(places.next(Duration::ZERO), None);
        places.told(place(1));
        places.told(place(2));
        assert_eq!(places.next(Duration::ZERO), Some(place(2)));
        assert_eq!(places.next(Duration::ZERO), None);
    }

    #[test]
    fn an_answer_names_its_epoch() {
        assert_eq!(heard_of(&heard(12)), Some(12));
        assert_eq!(heard_of("running 1 test"), None);
    }
}
