//! The CPU's backends, and groups of them.

use cpu::{Cpu, CpuConfig, Isa, Precision};
use kernels::Backend;
use model::{Checkpoint, RunnerOptions};
use models::{Group, folder, staged};
use std::sync::Arc;

/// The product's backend, with the best instructions of this machine.
pub fn exact() -> Cpu {
    cpu(2, Precision::Exact, Isa::Amx)
}

pub fn fast() -> Cpu {
    cpu(2, Precision::Fast, Isa::Amx)
}

pub fn fast_avx2() -> Cpu {
    cpu(1, Precision::Fast, Isa::Avx2)
}

pub fn fast_portable() -> Cpu {
    cpu(1, Precision::Fast, Isa::Portable)
}

fn cpu(threads: usize, precision: Precision, isa: Isa) -> Cpu {
    Cpu::new(CpuConfig { threads, precision, isa }).unwrap()
}

pub fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&folder(name).unwrap()).unwrap()
}

/// `world_size` ranks with a device each.
pub fn load<B: Backend>(
    checkpoint: &Arc<Checkpoint>,
    world_size: usize,
    options: RunnerOptions,
    device: fn() -> B,
) -> Group<B> {
    let devices = (0..world_size).map(|_| device()).collect();
    Group::load(checkpoint, options, devices, staged).unwrap()
}
