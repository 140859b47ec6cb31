//! The code that talks to NCCL, against one in host memory (`emulate::machine`): every rank has the
//! sums and columns, what is wrong is refused in words, and nothing waits for ever. One test asks
//! NVIDIA's own library, where there is one.
#![cfg(feature = "cuda")]

#[path = "common/counting.rs"]
mod counting;

use counting::Counting;
use cuda::{
    Communicator, Cuda, CudaConfig, Gpu, GpuConfig, NCCL_LIBRARY, Nccl, NcclLimits, NcclPlace,
    UniqueId,
};
use kernels::{Backend, KernelError, Tensor};
use std::{
    ffi::OsStr,
    thread,
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(300);
/// A loaded machine is slow; without a deadline these would not end at all.
const LONG: Duration = Duration::from_secs(40);

fn limits(each: Duration) -> NcclLimits {
    NcclLimits { first: each, usual: each }
}

fn library() -> Nccl {
    Nccl::open(OsStr::new(NCCL_LIBRARY)).unwrap()
}

fn device(ordinal: usize, limit: Duration) -> Cuda<Gpu> {
    Cuda::new(Gpu::open(GpuConfig::with_limit(ordinal, limit)).unwrap(), CudaConfig::default())
}

fn meet(
    device: &Cuda<Gpu>,
    (rank, ranks): (usize, usize),
    id: UniqueId,
    limits: NcclLimits,
) -> Result<Communicator<Gpu>, KernelError> {
    Communicator::meet(device.driver(), library(), NcclPlace { rank, ranks, id }, limits)
}

/// Runs `body` on as many ranks with a card each; what each gave.
fn on_ranks<T: Send>(
    ranks: usize,
    body: impl Fn(&Cuda<Gpu>, &mut Communicator<Gpu>) -> Result<T, KernelError> + Sync,
) -> Vec<Result<T, KernelError>> {
    let id = library().unique_id().unwrap();
    let rank = |rank: usize| -> Result<T, KernelError> {
        let device = device(rank, PATIENCE);
        let mut group = meet(&device, (rank, ranks), id, limits(PATIENCE))?;
        body(&device, &mut group)
    };
    thread::scope(|scope| {
        let rank = &rank;
        let threads: Vec<_> = (0..ranks).map(|index| scope.spawn(move || rank(index))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn refused<T>(result: Result<T, KernelError>) -> String {
    result.err().expect("an error").to_string()
}

/// Numbers of rank `rank` that are exact in bf16, and so are the sums of a few of them.
fn part(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|at| ((at * (7 + 3 * rank) + rank) % 31) as f32 - 15.0).collect()
}

fn floats(device: &Cuda<Gpu>, x: &Tensor<Cuda<Gpu>>) -> Result<Vec<f32>, KernelError> {
    let mut values = vec![0.0; x.rows * x.cols];
    device.read_floats(&mut values, &x.data)?;
    Ok(values)
}

#[test]
fn every_rank_has_the_sums_in_the_streams_order() {
    const NAME: &str = "every_rank_has_the_sums_in_the_streams_order";
    emulate::on_machine(NAME, 3, &[], || {
        // The last goes in several pieces.
        for (rows, cols) in [(0, 64), (1, 8), (5, 1032), (40, 1032)] {
            let each = on_ranks(3, |device, group| {
                let mut x = Tensor::from_host(device, cols, &part(group.rank(), rows * cols))?;
                let once = Tensor::from_host(device, cols, &part(9, rows * cols))?;
                // What comes between sums sees the one before, and the next sees it.
                for _ in 0..2 {
                    device.nccl_sum(group, &mut x)?;
                    device.add(&mut x, &once)?;
                }
                group.check(device.driver())?;
                floats(device, &x)
            });
            let first: Vec<Vec<f32>> = (0..3).map(|rank| part(rank, rows * cols)).collect();
            let wanted: Vec<f32> = (0..rows * cols)
                .map(|at| {
                    let once = part(9, at + 1)[at];
                    let sum: f32 = first.iter().map(|part| part[at]).sum();
                    half::bf16::from_f32(3.0 * (sum + once)).to_f32() + once
                })
                .map(|value| half::bf16::from_f32(value).to_f32())
                .collect();
            for (rank, got) in each.into_iter().enumerate() {
                assert!(got.unwrap() == wanted, "[{rows}, {cols}], rank {rank}");
            }
        }
    });
}

#[test]
fn columns_come_together_in_rank_order() {
    emulate::on_machine("columns_come_together_in_rank_order", 3, &[], || {
        let cols = [40, 8, 24];
        // More rows than go at once, and one that takes several pieces.
        for (rows, each) in [(150, 1), (2, 3000)] {
            let cols = cols.map(|cols| cols * each);
            let total: usize = cols.iter().sum();
            for to_all in [true, false] {
                let all = on_ranks(3, |device, group| {
                    let rank = group.rank();
                    let x = part(rank, rows * cols[rank]);
                    let x = Tensor::exact_from_host(device, cols[rank], &x)?;
                    let mut out = Tensor::exact_zeros(device, rows, total)?;
                    device.nccl_gather(group, &mut out, &x, &cols, to_all)?;
                    group.check(device.driver())?;
                    floats(device, &out)
                });
                let parts: Vec<Vec<f32>> =
                    (0..3).map(|rank| part(rank, rows * cols[rank])).collect();
                let wanted: Vec<f32> = (0..rows)
                    .flat_map(|row| {
                        let of = |rank: usize| &parts[rank][row * cols[rank]..][..cols[rank]];
                        (0..3).flat_map(of).copied().collect::<Vec<f32>>()
                    })
                    .collect();
                let all = all.into_iter().map(Result::unwrap).enumerate();
                for (rank, got) in all.filter(|(rank, _)| to_all || *rank == 0) {
                    assert!(got == wanted, "{rows} rows, rank {rank}, to all: {to_all}");
                }
            }
        }
    });
}

#[test]
fn rows_that_do_not_fit_are_refused_and_the_group_goes_on() {
    const NAME: &str = "rows_that_do_not_fit_are_refused_and_the_group_goes_on";
    emulate::on_machine(NAME, 1, &[], || {
        let done = on_ranks(1, |device, group| {
            let mut exact = Tensor::exact_zeros(device, 2, 8)?;
            assert!(refused(device.nccl_sum(group, &mut exact)).contains("not bf16"));
            let x = Tensor::exact_zeros(device, 2, 8)?;
            for cols in [&[8, 8][..], &[7][..]] {
                let text = refused(device.nccl_gather(group, &mut exact, &x, cols, true));
                assert!(text.contains("nccl_gather"), "{text}");
            }
            device.nccl_gather(group, &mut exact, &x, &[8], true)?;
            group.check(device.driver())
        });
        done.into_iter().for_each(Result::unwrap);
    });
}

#[test]
fn a_library_that_is_missing_or_another_one_is_told_with_the_remedy() {
    const NAME: &str = "a_library_that_is_missing_or_another_one_is_told_with_the_remedy";
    emulate::on_machine(NAME, 1, &[], || {
        for (library, wanted) in
            [("/nowhere/libnccl.so.2", "no NCCL"), ("libcublasLt.so.13", "ncclGetVersion")]
        {
            let text = refused(Nccl::open(OsStr::new(library)).map(drop));
            assert!(text.contains(library) && text.contains(wanted), "{text}");
            assert!(text.contains("install libnccl 2.18") && text.contains("--nccl"), "{text}");
        }
    });
}

#[test]
fn an_old_release_is_refused() {
    emulate::on_machine("an_old_release_is_refused", 1, &[("FAKE_NCCL", "version:21705")], || {
        let text = refused(Nccl::open(OsStr::new(NCCL_LIBRARY)).map(drop));
        assert!(text.contains("is release 2.17.5") && text.contains("install"), "{text}");
    });
}

#[test]
fn another_major_release_is_refused() {
    const NAME: &str = "another_major_release_is_refused";
    emulate::on_machine(NAME, 1, &[("FAKE_NCCL", "version:30001")], || {
        let text = refused(Nccl::open(OsStr::new(NCCL_LIBRARY)).map(drop));
        assert!(text.contains("is release 3.0.1") && text.contains("2.18 to 2.99"), "{text}");
    });
}

/// A rank that comes alone gives up, and leaves its device as it was.
#[test]
fn ranks_that_do_not_come_are_given_up_in_time() {
    const NAME: &str = "ranks_that_do_not_come_are_given_up_in_time";
    emulate::on_machine(NAME, 1, &[], || {
        let (device, id) = (device(0, PATIENCE), library().unique_id().unwrap());
        let start = Instant::now();
        let text = refused(meet(&device, (0, 2), id, limits(SHORT)).map(drop));
        assert!(text.contains("meeting the other ranks took longer than 0.3 s"), "{text}");
        assert!(start.elapsed() < LONG && start.elapsed() >= SHORT);
        device.driver().settle().unwrap();
    });
}

#[test]
fn a_meeting_that_fails_is_told_in_the_librarys_words() {
    const NAME: &str = "a_meeting_that_fails_is_told_in_the_librarys_words";
    emulate::on_machine(NAME, 1, &[("FAKE_NCCL", "init-fails")], || {
        let (device, id) = (device(0, PATIENCE), library().unique_id().unwrap());
        let text = refused(meet(&device, (0, 1), id, limits(PATIENCE)).map(drop));
        let wanted = "meeting the other ranks: unhandled system error (Bootstrap : no socket";
        assert!(text.contains(wanted), "{text}");
    });
}

#[test]
fn two_ranks_do_not_share_a_device() {
    emulate::on_machine("two_ranks_do_not_share_a_device", 1, &[], || {
        let id = library().unique_id().unwrap();
        thread::scope(|scope| {
            for rank in 0..2 {
                scope.spawn(move || {
                    let device = device(0, PATIENCE);
                    let text = refused(meet(&device, (rank, 2), id, limits(PATIENCE)).map(drop));
                    assert!(text.contains("invalid usage (Duplicate GPU"), "{text}");
                });
            }
        });
    });
}

fn alone(limit: Duration, body: impl FnOnce(&Cuda<Gpu>, &mut Communicator<Gpu>)) {
    let (device, id) = (device(0, limit), library().unique_id().unwrap());
    let calls = NcclLimits { first: PATIENCE, usual: SHORT };
    let mut group = meet(&device, (0, 1), id, calls).unwrap();
    group.check(device.driver()).unwrap();
    body(&device, &mut group);
}

#[test]
fn a_call_that_stays_in_progress_ends_the_group() {
    const NAME: &str = "a_call_that_stays_in_progress_ends_the_group";
    emulate::on_machine(NAME, 1, &[("FAKE_NCCL", "call-hangs")], || {
        alone(PATIENCE, |device, group| {
            let mut x = Tensor::zeros(device, 1, 8).unwrap();
            let text = refused(device.nccl_sum(group, &mut x));
            assert!(text.contains("a sum took longer than 0.3 s: is a rank missing?"), "{text}");
            for after in [device.nccl_sum(group, &mut x), group.check(device.driver())] {
                let text = refused(after);
                assert!(text.contains("out of use since: NCCL: a sum took longer"), "{text}");
            }
            device.driver().settle().unwrap();
        });
    });
}

/// The device stands still in the library's work then, until that is aborted.
#[test]
fn an_asynchronous_error_is_told_and_frees_the_device() {
    const NAME: &str = "an_asynchronous_error_is_told_and_frees_the_device";
    emulate::on_machine(NAME, 1, &[("FAKE_NCCL", "fails-after:2")], || {
        alone(PATIENCE, |device, group| {
            let mut x = Tensor::zeros(device, 1, 8).unwrap();
            device.nccl_sum(group, &mut x).unwrap();
            group.check(device.driver()).unwrap();
            device.nccl_sum(group, &mut x).unwrap();
            device.nccl_sum(group, &mut x).unwrap();
            let text = refused(group.check(device.driver()));
            let wanted = "NCCL: exchanging: remote process exited or there was a network error \
                          (a rank closed its connection)";
            assert_eq!(text, format!("device: {wanted}"));
            device.driver().settle().unwrap();
        });
    });
}

#[test]
fn an_abort_that_hangs_is_left_behind() {
    const NAME: &str = "an_abort_that_hangs_is_left_behind";
    emulate::on_machine(NAME, 1, &[("FAKE_NCCL", "call-hangs,abort-hangs")], || {
        let start = Instant::now();
        alone(PATIENCE, |device, group| {
            let mut x = Tensor::zeros(device, 1, 8).unwrap();
            let text = refused(device.nccl_sum(group, &mut x));
            assert!(text.contains("; aborting it has not ended within 5 s"), "{text}");
        });
        assert!(start.elapsed() < LONG);
    });
}

#[test]
fn an_abort_that_fails_is_told() {
    const NAME: &str = "an_abort_that_fails_is_told";
    emulate::on_machine(NAME, 1, &[("FAKE_NCCL", "call-hangs,abort-fails")], || {
        alone(PATIENCE, |device, group| {
            let mut x = Tensor::zeros(device, 1, 8).unwrap();
            let text = refused(device.nccl_sum(group, &mut x));
            assert!(text.contains("; NCCL: aborting: unhandled cuda error"), "{text}");
        });
    });
}

/// The library notices nothing: the device's own deadline does.
#[test]
fn a_rank_that_misses_a_sum_is_noticed_by_the_device() {
    const NAME: &str = "a_rank_that_misses_a_sum_is_noticed_by_the_device";
    emulate::on_machine(NAME, 2, &[], || {
        let id = library().unique_id().unwrap();
        let start = Instant::now();
        thread::scope(|scope| {
            let other = scope.spawn(move || {
                let device = device(1, PATIENCE);
                // Alive for as long as the other one waits.
                let group = meet(&device, (1, 2), id, limits(PATIENCE)).unwrap();
                thread::sleep(Duration::from_secs(6));
                drop(group);
            });
            let device = device(0, Duration::from_secs(3));
            let mut group = meet(&device, (0, 2), id, limits(PATIENCE)).unwrap();
            let mut x = Tensor::zeros(&device, 1, 8).unwrap();
            device.nccl_sum(&mut group, &mut x).unwrap();
            let text = refused(group.check(device.driver()));
            let wanted = "another rank may have missed an exchange by NCCL";
            assert!(
                text.contains("has not finished within 3 s") && text.contains(wanted),
                "{text}"
            );
            other.join().unwrap();
        });
        assert!(start.elapsed() < LONG);
    });
}

/// A sum of one rank's is what it was, and its columns are all there are.
fn exchange_alone(library: Nccl) {
    let (device, id) = (device(0, PATIENCE), library.unique_id().unwrap());
    let place = NcclPlace { rank: 0, ranks: 1, id };
    let mut group = Communicator::meet(device.driver(), library, place, limits(PATIENCE)).unwrap();
    let values = part(1, 100 * 64);
    let mut x = Tensor::from_host(&device, 64, &values).unwrap();
    let columns = Tensor::exact_from_host(&device, 64, &values).unwrap();
    let mut all = Tensor::exact_zeros(&device, 100, 64).unwrap();
    device.nccl_sum(&mut group, &mut x).unwrap();
    device.nccl_gather(&mut group, &mut all, &columns, &[64], true).unwrap();
    group.check(device.driver()).unwrap();
    assert_eq!(floats(&device, &x).unwrap(), values);
    assert_eq!(floats(&device, &all).unwrap(), values);
    drop(group);
    device.driver().settle().unwrap();
}

#[test]
fn a_rank_alone_exchanges_with_itself() {
    emulate::on_machine("a_rank_alone_exchanges_with_itself", 1, &[], || {
        exchange_alone(library());
    });
}

/// NVIDIA's library: it is opened and makes ids. On a machine without a device it says what is
/// missing, and with one it serves a rank alone. `LOCKSTEP_TEST_NCCL` names it, e.g. that of the
/// wheel nvidia-nccl-cu12.
#[test]
fn the_real_library_serves_a_rank_or_says_what_is_missing() {
    let Some(path) = std::env::var_os("LOCKSTEP_TEST_NCCL") else {
        eprintln!("SKIPPED: LOCKSTEP_TEST_NCCL names no libnccl.so.2");
        return;
    };
    let library = Nccl::open(&path).unwrap();
    let id = library.unique_id().unwrap();
    assert_ne!(id, library.unique_id().unwrap());
    if Gpu::count().is_ok() {
        return exchange_alone(library);
    }
    let (device, start) = (Counting::new(), Instant::now());
    let place = NcclPlace { rank: 0, ranks: 2, id };
    let met = Communicator::meet(&device, library, place, limits(PATIENCE));
    let text = refused(met.map(drop));
    eprintln!("NCCL {}: {text}", library.version());
    assert!(text.contains("NCCL: meeting the other ranks: "), "{text}");
    assert_eq!(device.held(), 0);
    assert!(start.elapsed() < LONG);
}
