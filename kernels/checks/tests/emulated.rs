//! Every check on the emulated device: in several orders of threads, watched for races, and under
//! AddressSanitizer.

use checks::Check;
use cuda::{Cuda, CudaConfig, WeightFormat};
use emulate::{ASAN, Emulator, PLAIN, RACES, Schedule, Variant, libasan, library};
use kernels::{Backend, Format, Tensor, WeightPart};
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

/// Where there are neither products in fp8 nor bulk copies, and few multiprocessors, whose blocks
/// make many parts of a product each.
#[test]
fn products_agree_on_an_older_and_smaller_device() {
    let library = library(PLAIN);
    let device = |config| {
        let emulator = Emulator::load(&library, Schedule::Random(2)).expect("it loads");
        Cuda::new(emulator.of_capability((8, 0)).of_multiprocessors(3), config)
    };
    let checks = [
        checks::linear::checks(),
        checks::skinny::checks(),
        checks::int4::checks(),
        checks::gated::checks(),
        checks::experts::checks(),
    ];
    for check in checks.into_iter().flatten() {
        assert_eq!((check.run)(&device), Ok(()), "{}", check.name);
    }
}

/// [5, 264] · [272, 264]ᵀ on a device of so many multiprocessors, in bits.
fn product_bits(multiprocessors: u32, weights: WeightFormat) -> Vec<u32> {
    let library = library(PLAIN);
    let emulator = Emulator::load(&library, Schedule::Backwards).expect("it loads");
    let config = CudaConfig { weights, ..CudaConfig::default() };
    let device = Cuda::new(emulator.of_multiprocessors(multiprocessors), config);
    let data: Vec<u8> = checks::noise(1, 272 * 264).iter().flat_map(|v| v.to_le_bytes()).collect();
    let weight =
        device.weight(&[WeightPart::plain(Format::F32, 272, 264, data)]).expect("a weight");
    let x = Tensor::from_host(&device, 264, &checks::noise(2, 5 * 264)).expect("x");
    let mut out = Tensor::exact_zeros(&device, 5, 272).expect("out");
    device.linear(&mut out, &x, &weight, None).expect("a product");
    let mut got = vec![0.0; 5 * 272];
    device.read_floats(&mut got, &out.data).expect("floats");
    got.into_iter().map(f32::to_bits).collect()
}

#[test]
fn the_number_of_multiprocessors_changes_no_bit() {
    for weights in [WeightFormat::Bf16, WeightFormat::Fp8] {
        let wanted = product_bits(132, weights);
        for multiprocessors in [1, 2, 5] {
            let got = product_bits(multiprocessors, weights);
            assert_eq!(got, wanted, "{multiprocessors} of {weights:?}");
        }
    }
}

#[test]
fn many_draws_follow_the_distribution() {
    run(&checks::sampling::many_draws(), PLAIN, Schedule::InTurn);
}

emulated!(
    chained,
    elementwise,
    every_rows,
    experts,
    fp8,
    gated,
    int4,
    laid_out,
    linear,
    norm,
    peers
);
emulated!(rope, prefill, prefill_sm90, decode, random, sampling, skinny, turned);
