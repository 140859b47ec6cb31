//! The device: opened, described, timed; and the checks on it.

use checks::{
    Check,
    bench::{About, Run},
};
use kernels::{
    KernelError,
    cuda::{Cuda, CudaConfig, Driver, Gpu, GpuConfig},
};
use serde_json::json;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

/// Several times what any device caches.
const FLUSH_BYTES: usize = 256 << 20;
const COPY_BYTES: usize = 2 << 30;

pub fn open(ordinal: usize, wait_limit: Duration) -> Result<Gpu, KernelError> {
    Gpu::open(GpuConfig { wait_limit, ..GpuConfig::new(ordinal) })
}

pub fn about(gpu: &Gpu, date: &str) -> Result<About, String> {
    let facts = gpu.facts();
    let (major, minor) = facts.compute_capability;
    Ok(About {
        device: facts.name.clone(),
        compute_capability: format!("{major}.{minor}"),
        driver: gpu.driver_version().map_err(|error| error.to_string())?,
        date: date.to_owned(),
        peer: None,
    })
}

/// Opens a device for each bench: what one left behind, the next does not meet.
pub fn maker(ordinal: usize) -> impl Fn(CudaConfig) -> Cuda<Gpu> {
    move |config| {
        let gpu = open(ordinal, Duration::from_secs(30));
        Cuda::new(gpu.unwrap_or_else(|error| panic!("{error}")), config)
    }
}

/// Bytes read and written per second by the driver's own copy.
pub fn copy_rate(gpu: &Gpu) -> Result<f64, KernelError> {
    let (from, to) = (gpu.zeroed("a copy", COPY_BYTES)?, gpu.zeroed("a copy", COPY_BYTES)?);
    let mut times = Vec::new();
    for _ in 0..9 {
        times.push(gpu.time(&mut || gpu.copy(&to, &from, COPY_BYTES))?);
    }
    times.sort();
    Ok(2.0 * COPY_BYTES as f64 / times[times.len() / 2].as_secs_f64())
}

type Clock = Box<dyn Fn(&Cuda<Gpu>, &mut Run<Gpu>) -> Result<Duration, KernelError>>;

/// Times one run by the device's own clock, after a copy that empties its caches and is still
/// running while the run is launched, so that launching is not timed.
pub fn clock(ordinal: usize) -> Result<Clock, KernelError> {
    let gpu = open(ordinal, Duration::from_secs(30))?;
    let (from, to) = (gpu.zeroed("a copy", FLUSH_BYTES)?, gpu.zeroed("a copy", FLUSH_BYTES)?);
    drop(gpu);
    Ok(Box::new(move |device, run| {
        let gpu = device.driver();
        gpu.copy(&to, &from, FLUSH_BYTES)?;
        gpu.time(&mut || run(device))
    }))
}

/// Runs checks, and says so in one line of JSON each; whether all hold.
pub fn checks(
    ordinal: usize,
    checks: &[Check<Gpu>],
    (within, patience): (Duration, Duration),
) -> Result<bool, String> {
    let make = |config| {
        let gpu = open(ordinal, patience);
        Cuda::new(gpu.unwrap_or_else(|error| panic!("{error}")), config)
    };
    open(ordinal, patience).map_err(|error| error.to_string())?;
    let start = Instant::now();
    let mut all_hold = true;
    for check in checks {
        if start.elapsed() > within {
            println!("{}", json!({ "name": check.name, "skipped": true }));
            continue;
        }
        let result = catch_unwind(AssertUnwindSafe(|| (check.run)(&make)));
        let error = match result {
            Ok(result) => result.err(),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                Some(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panicked").into())
            }
        };
        all_hold &= error.is_none();
        println!("{}", json!({ "name": check.name, "error": error }));
    }
    Ok(all_hold)
}
