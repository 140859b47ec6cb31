//! The CUDA backend in emulation against the reference implementations.

use cuda::{Cuda, CudaConfig, PrefillKernel};
use emulate::{Emulator, PLAIN, Schedule, library};

fn models(check: &str, prefill: PrefillKernel) {
    let library = library(PLAIN);
    let device = |config| {
        let emulator = Emulator::load(&library, Schedule::InTurn).expect("it loads");
        Cuda::new(emulator, CudaConfig { prefill, ..config })
    };
    let mut checks = models::checks().into_iter();
    let check = checks.find(|one| one.name == check).expect("a check of this name");
    assert_eq!((check.run)(&device), Ok(()), "{}", check.name);
}

#[test]
fn models_agree_with_the_reference_implementations() {
    models("models in bf16", PrefillKernel::Mma);
}

#[test]
fn models_agree_with_them_by_wgmma_too() {
    models("models in bf16", PrefillKernel::Wgmma);
}

#[test]
fn models_with_weights_in_fp8_come_near_them() {
    models("models with weights in fp8", PrefillKernel::Wgmma);
}

#[test]
fn models_with_caches_in_fp8_come_near_them() {
    models("models with caches in fp8", PrefillKernel::Mma);
}
