//! Every check on the emulated device: in several orders of threads, watched for races, and under
//! AddressSanitizer.

use checks::Check;
use cuda::Cuda;
use emulate::{ASAN, Emulator, PLAIN, RACES, Schedule, Variant, libasan, library};
use std::{env, process::Command};

/// Set for the process that runs under AddressSanitizer.
const UNDER_ASAN: &str = "LOCKSTEP_CHECKS_UNDER_ASAN";

fn run(checks: &[Check<Emulator>], variant: Variant, schedule: Schedule) {
    let library = library(variant);
    for check in checks {
        let device = |config| {
            let emulator = Emulator::load(&library, schedule).expect("the library loads");
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
        .env("LD_PRELOAD", libasan())
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

/// Where there are no products in fp8, such weights are widened.
#[test]
fn linear_agrees_on_an_older_device() {
    let library = library(PLAIN);
    let device = |config| {
        let emulator = Emulator::load(&library, Schedule::InTurn).expect("it loads");
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

emulated!(elementwise, every_rows, experts, fp8, int4, linear, norm, peers);
emulated!(rope, prefill, prefill_sm90, decode, sampling);
