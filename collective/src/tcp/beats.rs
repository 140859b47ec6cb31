//! Signs of life between rank 0 and the others, on links of their own: whoever is stopped or cut
//! off falls silent there, whatever it was doing, and whoever is only slow does not.
//!
//! Silence is counted in waits that brought nothing, not in time that passed: a process that was
//! stopped itself finds what came meanwhile before it takes anyone for silent.

use super::{Tcp, link::Link};
use std::{
    io,
    net::{Shutdown, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Between two signs of life.
pub(super) const BEAT: Duration = Duration::from_millis(250);

/// Why a rank is taken for lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// It has not been heard of for so long.
    Silent(Duration),
    /// Its end of the link is closed: the process has ended, or was told to.
    Closed,
}

/// Ends links from any thread: whoever waits on one of them returns at once.
#[derive(Clone, Debug)]
pub struct Cut(Arc<Vec<TcpStream>>);

impl Cut {
    /// For all links of `groups`.
    ///
    /// # Errors
    /// The system has no more descriptors.
    pub fn of(groups: &[&Tcp]) -> io::Result<Self> {
        let links = groups.iter().flat_map(|group| &group.links);
        Ok(Self(Arc::new(links.map(Link::handle).collect::<io::Result<_>>()?)))
    }

    pub fn cut(&self) {
        for stream in self.0.iter() {
            // It may be gone already, which is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// The signs of life of one rank, and its ears for the others'. They end with the value.
pub struct Beats {
    links: Cut,
    ending: Arc<AtomicBool>,
}

impl Beats {
    /// Starts a thread for each of `links`, which are used for nothing else. `lost` is called, from
    /// its thread and once, with the rank that has been silent for `silence`, or has left.
    ///
    /// # Errors
    /// The system gives no thread, or no descriptor.
    pub fn start(
        links: Tcp,
        silence: Duration,
        lost: impl Fn(usize, Loss) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let beats = Self { links: Cut::of(&[&links])?, ending: Arc::default() };
        let lost = Arc::new(lost);
        for mut link in links.links {
            let (lost, ending) = (Arc::clone(&lost), Arc::clone(&beats.ending));
            let body = move || {
                let loss = link.beat(silence);
                if !ending.load(Ordering::SeqCst) {
                    lost(link.rank(), loss);
                }
            };
            thread::Builder::new().name("beats".into()).spawn(body)?;
        }
        Ok(beats)
    }

    /// From now on nobody is told of losses; the others still hear of this rank.
    pub fn expect_end(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }
}

impl Drop for Beats {
    fn drop(&mut self) {
        self.expect_end();
        self.links.cut();
    }
}

/// Sends a sign of life each [`BEAT`] by `send` and waits for the other side's by `hear`, for up to
/// so long; returns once it has been silent for `silence`, or left.
pub(super) fn exchange(
    silence: Duration,
    mut send: impl FnMut() -> io::Result<()>,
    mut hear: impl FnMut(Duration) -> io::Result<usize>,
) -> Loss {
    let waits_max = silence.as_millis().div_ceil(BEAT.as_millis());
    let mut waits = 0;
    let mut next = Instant::now();
    loop {
        let now = Instant::now();
        if now >= next {
            match send() {
                // It reads nothing: its silence will tell.
                Err(error) if !is_pause(&error) => return Loss::Closed,
                _ => next = now + BEAT,
            }
        }
        match hear(next.saturating_duration_since(now).max(Duration::from_millis(1))) {
            Ok(0) => return Loss::Closed,
            Ok(_) => waits = 0,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_pause(&error) => waits += 1,
            Err(_) => return Loss::Closed,
        }
        if waits >= waits_max {
            return Loss::Silent(silence);
        }
    }
}

fn is_pause(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paused() -> io::Error {
        io::ErrorKind::WouldBlock.into()
    }

    #[test]
    fn silence_is_counted_in_waits_that_brought_nothing() {
        // Heard after each seventh empty wait: never silent, until nothing comes any more.
        let mut heard = 0;
        let hear = |_| {
            heard += 1;
            if heard < 100 && heard % 8 == 0 { Ok(1) } else { Err(paused()) }
        };
        let silence = Duration::from_secs(2);
        assert_eq!(exchange(silence, || Ok(()), hear), Loss::Silent(silence));
        assert_eq!(heard, 96 + 8);
    }

    #[test]
    fn one_long_pause_of_our_own_is_no_silence() {
        // As after a stop of this process: the wait took long, and what came lies there.
        let mut answers = vec![Ok(0), Ok(3), Err(paused())].into_iter().rev();
        let hear = |_| {
            thread::sleep(2 * BEAT);
            answers.next().unwrap()
        };
        assert_eq!(exchange(2 * BEAT, || Ok(()), hear), Loss::Closed);
    }

    #[test]
    fn a_full_link_is_left_to_silence_and_a_broken_one_is_closed() {
        let closed = exchange(BEAT, || Err(io::ErrorKind::BrokenPipe.into()), |_| Ok(1));
        assert_eq!(closed, Loss::Closed);
        let silent = exchange(BEAT, || Err(paused()), |_| Err(paused()));
        assert_eq!(silent, Loss::Silent(BEAT));
    }
}
