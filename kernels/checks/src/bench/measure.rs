//! Times benches and judges them.

use super::{Bar, Bench, Prepare, Run, Work};
use crate::Device;
use cuda::{Cuda, Driver};
use kernels::KernelError;
use std::time::{Duration, Instant};

/// Times what is given to it on a device that was idle and whose caches hold nothing of it.
pub type Clock<'a, D> = &'a dyn Fn(&Cuda<D>, &mut Run<D>) -> Result<Duration, KernelError>;

/// How long a bench runs.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// An idle device has low clocks, and takes a while to raise them.
    pub warm_up: Duration,
    pub samples: usize,
}

/// What a bench came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub op: &'static str,
    pub shape: String,
    pub work: Work,
    pub bar: Bar,
    /// Median.
    pub seconds: f64,
    /// Of the bench's baseline, where it has one.
    pub baseline_seconds: Option<f64>,
    /// Of a peer on the same shape.
    pub peer_seconds: Option<f64>,
}

impl Outcome {
    /// Bytes or FLOP per second.
    pub fn rate(&self) -> f64 {
        let (Work::Bytes(amount) | Work::Flops(amount)) = self.work;
        amount / self.seconds
    }

    /// Whether the bar holds; `None` where nothing is judged.
    pub fn holds(&self, copy_rate: f64) -> Option<bool> {
        match self.bar {
            Bar::OfCopy(share) => Some(self.rate() >= share * copy_rate),
            Bar::Tflops(least) => Some(self.rate() >= least * 1e12),
            Bar::Microseconds(most) => Some(self.seconds * 1e6 <= most),
            Bar::Times(least) => self.baseline_seconds.map(|base| base / self.seconds >= least),
            Bar::None => None,
        }
    }
}

/// Runs a bench at `pace`; medians.
///
/// # Errors
/// What the device or the op refuses.
pub fn measure<D: Driver>(
    device: Device<'_, D>,
    bench: &Bench<D>,
    clock: Clock<'_, D>,
    pace: Pace,
) -> Result<Outcome, KernelError> {
    let device = &device(bench.config);
    let seconds = median(device, &bench.prepare, clock, pace)?;
    let baseline = bench.baseline.as_ref();
    let baseline = baseline.map(|prepare| median(device, prepare, clock, pace)).transpose()?;
    Ok(Outcome { baseline_seconds: baseline, ..bench.outcome(seconds) })
}

impl<D: Driver> Bench<D> {
    /// That it took so long; nothing of a baseline or a peer.
    pub fn outcome(&self, seconds: f64) -> Outcome {
        Outcome {
            op: self.op,
            shape: self.shape.clone(),
            work: self.work,
            bar: self.bar,
            seconds,
            baseline_seconds: None,
            peer_seconds: None,
        }
    }

    /// Whether this is what came to it.
    pub fn same(&self, outcome: &Outcome) -> bool {
        self.op == outcome.op && self.shape == outcome.shape
    }

    /// For people, and unlike any other's.
    pub fn name(&self) -> String {
        format!("{} {}", self.op, self.shape)
    }
}

fn median<D: Driver>(
    device: &Cuda<D>,
    prepare: &Prepare<D>,
    clock: Clock<'_, D>,
    pace: Pace,
) -> Result<f64, KernelError> {
    let mut run = prepare(device)?;
    let start = Instant::now();
    // At least twice: the first run loads code, finds algorithms and makes room.
    clock(device, &mut run)?;
    clock(device, &mut run)?;
    while start.elapsed() < pace.warm_up {
        clock(device, &mut run)?;
    }
    let mut times = Vec::new();
    for _ in 0..pace.samples.max(1) {
        times.push(clock(device, &mut run)?.as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
