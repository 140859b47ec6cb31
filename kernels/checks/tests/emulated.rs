//! Every check on the emulated device: in several orders of threads, watched for races, and under
//! AddressSanitizer.

use checks::Check;
use emulate::{ASAN, Emulator, LIBASAN, PLAIN, RACES, Schedule};
use kernels::cuda::{Cuda, CudaConfig, PrefillKernel};
use std::{env, path::Path, process::Command};

/// Set for the process that runs under AddressSanitizer.
const UNDER_ASAN: &str = "LOCKSTEP_CHECKS_UNDER_ASAN";

fn run(checks: &[Check<Emulator>], library: &str, schedule: Schedule) {
    for check in checks {
        let device = |config| {
            let emulator = Emulator::load(Path::new(library), schedule).expect("the library loads");
            Cuda::new(emulator, config)
        };
        let result = (check.run)(&device);
        assert_eq!(result, Ok(()), "{} with threads {schedule:?}", check.name);
    }
}

/// Runs this test again in a process with the sanitizer, which must be loaded first.
fn run_under_asan(test: &str, checks: &[Check<Emulator>]) {
    if env::var_os(UNDER_ASAN).is_some() {
        return run(checks, ASAN, Schedule::InTurn);
    }
    let this = env::current_exe().expect("the test's own path");
    let done = Command::new(this)
        .args(["--exact", test, "--nocapture"])
        .env(UNDER_ASAN, "1")
        .env("LD_PRELOAD", LIBASAN)
        .env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0")
        .output()
        .expect("the test runs again");
    let (out, errors) =
        (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success() && out.contains("1 passed"), "{errors}{out}");
}

macro_rules! emulated {
    ($($room:ident),*) => {$(
        mod $room {
            use super::*;

            #[test]
            fn agrees_with_threads_in_turn() {
                run(&checks::$room::checks(), PLAIN, Schedule::InTurn);
            }

            #[test]
            fn agrees_with_threads_backwards() {
                run(&checks::$room::checks(), PLAIN, Schedule::Backwards);
            }

            #[test]
            fn agrees_with_threads_at_random() {
                run(&checks::$room::checks(), PLAIN, Schedule::Random(1));
            }

            #[test]
            fn has_no_races() {
                run(&checks::$room::checks(), RACES, Schedule::InTurn);
            }

            #[test]
            fn is_clean_under_the_address_sanitizer() {
                let test = concat!(stringify!($room), "::is_clean_under_the_address_sanitizer");
                run_under_asan(test, &checks::$room::checks());
            }
        }
    )*};
}

#[test]
fn decode_agrees_on_a_long_context() {
    run(&checks::decode::long_checks(), PLAIN, Schedule::InTurn);
}

#[test]
fn attention_is_about_as_exact_as_pytorchs() {
    run(&checks::accuracy::checks(), PLAIN, Schedule::InTurn);
}

fn models(check: &str, prefill: PrefillKernel) {
    let device = |config| {
        let emulator = Emulator::load(Path::new(PLAIN), Schedule::InTurn).expect("it loads");
        Cuda::new(emulator, CudaConfig { prefill, ..config })
    };
    let mut checks = checks::goldens::checks().into_iter();
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

/// Where there are no products in fp8, such weights are widened.
#[test]
fn linear_agrees_on_an_older_device() {
    let device = |config| {
        let emulator = Emulator::load(Path::new(PLAIN), Schedule::InTurn).expect("it loads");
        Cuda::new(emulator.of_capability((8, 0)), config)
    };
    for check in checks::linear::checks() {
        assert_eq!((check.run)(&device), Ok(()), "{}", check.name);
    }
}

#[test]
fn many_draws_follow_the_distribution() {
    run(&checks::sampling::many_draws(), PLAIN, Schedule::InTurn);
}

emulated!(elementwise, fp8, int4, linear, norm, rope, prefill, prefill_sm90, decode, sampling);
