//! Signs of the engine loop, for those who wait for it.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// When the loop last turned, and whether it is to end.
pub(crate) struct Pulse {
    start: Instant,
    /// Milliseconds after `start`.
    turned: AtomicU64,
    stops: AtomicBool,
}

impl Default for Pulse {
    fn default() -> Self {
        let (turned, stops) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { start: Instant::now(), turned, stops }
    }
}

impl Pulse {
    pub fn turn(&self) {
        self.turned.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    pub fn age(&self) -> Duration {
        let turned = Duration::from_millis(self.turned.load(Ordering::Relaxed));
        self.start.elapsed().saturating_sub(turned)
    }

    /// The loop is to end, whatever it is in.
    pub fn stop(&self) {
        self.stops.store(true, Ordering::Relaxed);
    }

    pub fn stops(&self) -> bool {
        self.stops.load(Ordering::Relaxed)
    }
}
