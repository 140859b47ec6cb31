//! Every bench runs on the emulated device, on tiny shapes, and the report tells what came of it.

use checks::bench::{self, About, Pace, Report, Scale};
use cuda::{Cuda, CudaConfig};
use emulate::{Emulator, PLAIN, Schedule};
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
    let ceilings = Report { copy_rate: 1e9, product_rate: 1e9, ..Report::default() };
    let mut report = Report { about, checks, sanitizer, failed, ..ceilings };
    let ceiling = bench::ceiling::<Emulator>(Scale::Tiny);
    let pace = Pace { warm_up: Duration::ZERO, samples: 1 };
    for bench in benches.iter().chain([&ceiling]) {
        let outcome = bench::measure(&device, bench, &clock, pace);
        let outcome =
            outcome.unwrap_or_else(|error| panic!("{} {}: {error}", bench.op, bench.shape));
        assert!(outcome.seconds > 0.0 && outcome.rate() > 0.0, "{outcome:?}");
        assert_eq!(outcome.baseline_seconds.is_some(), bench.baseline.is_some(), "{outcome:?}");
        report.outcomes.push(outcome);
    }
    let (json, markdown) = (report.json(), report.markdown());
    let blank = Report { about: report.about.clone(), ..Report::default() };
    let ceiling = report.outcomes.pop();
    let kept = blank.kept(&report.json(), &benches);
    assert_eq!(kept.as_ref(), Some(&report));
    let later = About { date: "another".into(), ..About::default() };
    assert_eq!(Report { about: later, ..blank }.kept(&report.json(), &benches), None);
    report.outcomes.extend(ceiling);
    for (at, (op, shape)) in names.iter().enumerate() {
        assert!(markdown.contains(&format!("| {op} | {shape} | ")), "{markdown}");
        assert_eq!(json["figures"][at]["op"], *op);
    }
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
