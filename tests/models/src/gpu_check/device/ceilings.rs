//! What the device can do at all: the fastest copy, read and product, and what a launch and a wait
//! cost. Every other figure of the report is a share of one of these.

use super::{Card, Driver, KernelError};
use crate::work::pace;
use checks::{
    BF16,
    bench::{self, Bench, Scale},
};
use cuda::{Cuda, Launch};
use kernels::Tensor;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A name, and what measures it.
pub type Ceiling = (&'static str, fn(&Card, Scale) -> Result<Value, String>);

pub const ALL: [Ceiling; 6] = [
    ("copy", |card, scale| told(copy(card, scale))),
    ("read", |card, scale| told(read(card, scale))),
    ("product in bf16", |card, scale| product(card, scale, &bench::ceiling(scale), "bf16")),
    ("product in fp8", |card, scale| product(card, scale, &bench::fp8_ceiling(scale), "fp8")),
    ("kernel boundary in a stream", |card, scale| told(boundary(card, scale))),
    ("wake-up", |card, scale| told(wake_up(card, scale))),
];

fn told(value: Result<Value, KernelError>) -> Result<Value, String> {
    value.map_err(|error| error.to_string())
}

/// Of the last ones: the first find low clocks.
fn median(
    times: usize,
    mut one: impl FnMut() -> Result<Duration, KernelError>,
) -> Result<f64, KernelError> {
    let taken: Result<Vec<Duration>, KernelError> = (0..times).map(|_| one()).collect();
    let mut taken = taken?.split_off(times - times.div_ceil(8));
    taken.sort();
    Ok(taken[taken.len() / 2].as_secs_f64())
}

/// Of bf16: several times what any device caches.
const COLS: usize = 8192;

fn rows(scale: Scale) -> usize {
    scale.of((2 << 30) / (2 * COLS), 2)
}

/// By the driver's own copy.
fn copy(card: &Card, scale: Scale) -> Result<Value, KernelError> {
    let bytes = rows(scale) * COLS * 2;
    let room = || card.zeroed("a copy", bytes);
    let (from, to) = (room()?, room()?);
    let gpu = &card.gpu;
    let seconds = median(scale.of(200, 2), || gpu.time(&mut || gpu.copy(&to, (&from, 0), bytes)))?;
    let rate = 2.0 * bytes as f64 / seconds;
    Ok(json!({ "ceilings": { "copy_bytes_per_second": rate } }))
}

fn read(card: &Card, scale: Scale) -> Result<Value, KernelError> {
    let device = card.backend(BF16);
    let mut x = Tensor::zeros(&device, rows(scale), COLS)?;
    device.fill_noise(&mut x, 1)?;
    let gpu = &card.gpu;
    let seconds = median(scale.of(200, 2), || gpu.time(&mut || device.read_all(&x)))?;
    let rate = (rows(scale) * COLS * 2) as f64 / seconds;
    Ok(json!({ "ceilings": { "read_bytes_per_second": rate } }))
}

fn product(card: &Card, scale: Scale, bench: &Bench<Card>, name: &str) -> Result<Value, String> {
    let make = |config| card.backend(config);
    let clock =
        |device: &Cuda<Card>, run: &mut bench::Run<Card>| device.driver().time(&mut || run(device));
    let outcome = bench::measure(&make, bench, &clock, pace(scale));
    let rate = outcome.map_err(|error| error.to_string())?.rate();
    Ok(json!({ "ceilings": { (format!("{name}_flops_per_second")): rate } }))
}

/// As `add_bf16` takes them; of no vectors.
#[repr(C)]
#[derive(Clone, Copy)]
struct Nothing([u64; 3]);

fn nothing(card: &Card) -> Result<(), KernelError> {
    card.launch(Launch::new("add_bf16", [1, 1, 1], 256, &Nothing([0; 3])))
}

/// Kernels of nothing, one behind another.
fn boundary(card: &Card, scale: Scale) -> Result<Value, KernelError> {
    let launches = scale.of(500, 3);
    let mut all = || (0..launches).try_for_each(|_| nothing(card));
    let seconds = median(scale.of(40, 2), || card.gpu.time(&mut all))?;
    let each = seconds / launches as f64;
    Ok(json!({ "ceilings": { "stream_boundary_seconds": each } }))
}

/// From the end of work to the host that waits for it: of a kernel of nothing, launch, copy and
/// all; and past what the device itself measured of some milliseconds of work.
fn wake_up(card: &Card, scale: Scale) -> Result<Value, KernelError> {
    let memory = card.zeroed("a wake-up", 256)?;
    let seen = || -> Result<(), KernelError> { card.read(&mut [0; 4], &memory, 0) };
    let idle = median(scale.of(400, 2), || {
        let begun = Instant::now();
        nothing(card)?;
        seen()?;
        Ok(begun.elapsed())
    })?;
    let bytes = rows(scale) * COLS * 2;
    let room = || card.zeroed("work", bytes);
    let (from, to, gpu) = (room()?, room()?, &card.gpu);
    let busy = median(scale.of(40, 2), || {
        let begun = Instant::now();
        let work = gpu.time(&mut || {
            (0..scale.of(10, 1)).try_for_each(|_| gpu.copy(&to, (&from, 0), bytes))
        })?;
        Ok(begun.elapsed().saturating_sub(work))
    })?;
    Ok(json!({ "ceilings": { "idle_wake_seconds": idle, "busy_wake_seconds": busy } }))
}
