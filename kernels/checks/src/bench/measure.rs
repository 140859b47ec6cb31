//! Times benches and judges them.

use super::{Bar, Bench, Prepare, Run, Work};
use crate::Device;
use kernels::{
    KernelError,
    cuda::{Cuda, Driver},
};
use std::time::Duration;

/// Times what is given to it on a device that was idle and whose caches hold nothing of it.
pub type Clock<'a, D> = &'a dyn Fn(&Cuda<D>, &mut Run<D>) -> Result<Duration, KernelError>;

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

/// Runs a bench `samples` times after two runs to warm up; medians.
///
/// # Errors
/// What the device or the op refuses.
pub fn measure<D: Driver>(
    device: Device<'_, D>,
    bench: &Bench<D>,
    clock: Clock<'_, D>,
    samples: usize,
) -> Result<Outcome, KernelError> {
    let device = &device(bench.config);
    let seconds = median(device, &bench.prepare, clock, samples)?;
    let baseline = bench.baseline.as_ref();
    let baseline = baseline.map(|prepare| median(device, prepare, clock, samples)).transpose()?;
    Ok(Outcome {
        op: bench.op,
        shape: bench.shape.clone(),
        work: bench.work,
        bar: bench.bar,
        seconds,
        baseline_seconds: baseline,
        peer_seconds: None,
    })
}

fn median<D: Driver>(
    device: &Cuda<D>,
    prepare: &Prepare<D>,
    clock: Clock<'_, D>,
    samples: usize,
) -> Result<f64, KernelError> {
    let mut run = prepare(device)?;
    for _ in 0..2 {
        run(device)?;
    }
    let mut times = Vec::new();
    for _ in 0..samples.max(1) {
        times.push(clock(device, &mut run)?.as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
