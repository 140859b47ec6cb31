//! Every bench runs on the emulated device, on tiny shapes, and the report tells what came of it.

use checks::bench::{self, About, Layer, Pace, Report, Scale};
use cuda::{Cuda, CudaConfig};
use emulate::{Emulator, PLAIN, Schedule};
use kernels::KernelError;
use std::time::{Duration, Instant};

fn device(config: CudaConfig) -> Cuda<Emulator> {
    let emulator =
        Emulator::load(&emulate::library(PLAIN), Schedule::InTurn).expect("the library loads");
    Cuda::new(emulator, config)
}

#[test]
fn every_bench_runs_and_is_reported() {
    let clock = |device: &Cuda<Emulator>, run: &mut bench::Run<Emulator>| {
        let start = Instant::now();
        run(device)?;
        Ok(start.elapsed())
    };
    let benches = bench::all::<Emulator>(Scale::Tiny);
    let names: Vec<_> = benches.iter().map(|bench| (bench.op, bench.shape.clone())).collect();
    let about = About { device: "emulated".into(), ..About::default() };
    let checks = vec![("add".into(), None), ("rope".into(), Some("wrong".into()))];
    let sanitizer =
        vec![("memcheck".into(), Ok("2 checks".into())), ("racecheck".into(), Err("a".into()))];
    let failed = vec![("add 8".into(), "no memory".into())];
    let ceilings = ["copy_bytes_per_second", "bf16_flops_per_second", "read_bytes_per_second"];
    let ceilings = ceilings.map(|name| (name.to_owned(), 1e9)).into();
    let mut report = Report { about, checks, sanitizer, failed, ceilings, ..Report::default() };
    let others = [bench::ceiling(Scale::Tiny), bench::fp8_ceiling(Scale::Tiny)];
    let pace = Pace { warm_up: Duration::ZERO, samples: 1 };
    for bench in benches.iter().chain(&others) {
        let outcome = bench::measure(&device, bench, &clock, pace);
        let outcome =
            outcome.unwrap_or_else(|error| panic!("{} {}: {error}", bench.op, bench.shape));
        assert!(outcome.seconds > 0.0 && outcome.rate() > 0.0, "{outcome:?}");
        assert_eq!(outcome.baseline_seconds.is_some(), bench.baseline.is_some(), "{outcome:?}");
        report.outcomes.push(outcome);
    }
    let (json, markdown) = (report.json(), report.markdown());
    for (at, (op, shape)) in names.iter().enumerate() {
        assert!(markdown.contains(&format!("| {op} | {shape} | ")), "{markdown}");
        assert_eq!(json["figures"][at]["op"], *op);
    }
}

#[test]
fn every_step_runs_and_is_reported() {
    let mut held = None;
    let mut report = Report::default();
    for step in bench::steps(Scale::Tiny) {
        let fresh = || {
            let device = device(step.of.config());
            let layer = Layer::new(&device, &step.of).expect("a layer");
            (step.of, device, layer)
        };
        let (of, device, layer) = held.take().unwrap_or_else(fresh);
        let (of, mut device, layer) = if of == step.of { (of, device, layer) } else { fresh() };
        let timer = |_: &Cuda<Emulator>, work: &mut dyn FnMut() -> Result<(), KernelError>| {
            let start = Instant::now();
            work()?;
            Ok(start.elapsed())
        };
        let outcome = step.measure(&mut device, &layer, &timer).expect("it runs");
        assert!(outcome.seconds > 0.0 && outcome.bytes() > 0.0, "{outcome:?}");
        assert_eq!(outcome.kernels.len(), 7);
        report.steps.push((step.name(), outcome));
        held = Some((of, device, layer));
    }
    assert_eq!(report.steps.len(), 2 * 3 * 2);
    for (name, _) in &report.steps {
        assert!(report.markdown().contains(&format!("| {name} | 2 | ")));
    }
}

#[test]
fn full_steps_have_names_of_their_own() {
    let steps = bench::steps(Scale::Full);
    assert_eq!(steps.len(), 2 * 3 * 4 * 2);
    let names: std::collections::BTreeSet<String> = steps.iter().map(|step| step.name()).collect();
    assert_eq!(names.len(), steps.len());
}

#[test]
fn full_benches_have_names_of_their_own() {
    let benches = bench::all::<Emulator>(Scale::Full);
    let mut names: Vec<_> = benches.iter().map(|bench| (bench.op, &bench.shape)).collect();
    let all = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), all, "{names:?}");
}
