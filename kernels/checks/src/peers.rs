//! Exchanges between ranks by each other's memory: as many devices as ranks, a thread each.

use crate::flat::{guarded, refused, text, unwritten, written};
use crate::{BF16, Check, Device, noise, rounded};
use cuda::{Cuda, CudaConfig, Driver, PeerConfig, PeerRegion, Peers};
use kernels::{AddNorm, Backend, KernelError, Tensor};
use std::{
    sync::{Barrier, Mutex},
    thread,
    time::Duration,
};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "peer_sum: every rank has the sum in rank order", run: sums },
        Check { name: "peer_sum with a norm is peer_sum, then add_rms_norm", run: sums_and_norms },
        Check { name: "peer_gather", run: gathers },
        Check { name: "peers that come late", run: late },
        Check { name: "a peer that does not come", run: absent },
        Check { name: "peers: what is refused", run: refusals },
    ]
}

const EPS: f32 = 1e-6;
const PATIENCE: Duration = Duration::from_secs(20);
/// Small, so that few rows already take several calls.
const CONFIG: PeerConfig = PeerConfig {
    area_bytes: 512 << 10,
    one_shot_bytes: 16 << 10,
    limit: PATIENCE,
    first_limit: PATIENCE,
};

/// Ranks, rows and columns: one-shot and two-shot, about the ends of what a block holds, fewer
/// rows than ranks, several calls.
const SHAPES: [(usize, usize, usize); 12] = [
    (2, 1, 64),
    (2, 9, 896),
    (2, 3, 2048),
    (3, 1, 8192),
    (3, 4, 1032),
    (3, 10, 1016),
    (2, 2, 8200),
    (2, 5, 16384),
    (8, 3, 64),
    (8, 5, 5120),
    (5, 40, 2056),
    (4, 0, 128),
];

/// What a rank does with its device and its peers.
type Body<'a, D, T> = &'a (dyn Fn(&Cuda<D>, &mut Peers<D>) -> Result<T, KernelError> + Sync);

/// Runs `body` on every rank at once; what each gave.
fn on_ranks<D: Driver, T: Send>(
    device: Device<'_, D>,
    ranks: usize,
    config: PeerConfig,
    body: Body<'_, D, T>,
) -> Result<Vec<T>, String> {
    // On a card they share it.
    let apart = CudaConfig { overlap: false, ..BF16 };
    let devices: Vec<Cuda<D>> = (0..ranks).map(|_| device(apart)).collect();
    let (tickets, met) = (Mutex::new(vec![Vec::new(); ranks]), Barrier::new(ranks));
    let rank = |rank: usize, device: Cuda<D>| -> Result<T, KernelError> {
        let region = PeerRegion::new(device.driver(), config)?;
        let ticket = region.ticket(device.driver())?;
        tickets.lock().unwrap_or_else(|error| error.into_inner())[rank] = ticket;
        met.wait();
        let all = tickets.lock().unwrap_or_else(|error| error.into_inner()).clone();
        let mut peers = Peers::new(region, rank, Peers::map_others(device.driver(), rank, &all)?);
        met.wait();
        body(&device, &mut peers)
    };
    let done: Vec<_> = thread::scope(|scope| {
        let rank = &rank;
        let spawned = devices.into_iter().enumerate();
        let threads: Vec<_> =
            spawned.map(|(index, device)| scope.spawn(move || rank(index, device))).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let done = done.into_iter().map(|done| done.unwrap_or_else(|_| panic!("a rank panicked")));
    done.collect::<Result<_, _>>().map_err(text)
}

/// Rank `rank`'s part of call `call`.
fn part(rank: usize, call: usize, len: usize) -> Vec<f32> {
    rounded(&noise((1 + rank + 100 * call) as u64, len))
}

/// The sum of every rank's part of a call, in rank order.
fn sum(ranks: usize, call: usize, len: usize) -> Vec<f32> {
    let mut sum = vec![0.0; len];
    for rank in 0..ranks {
        sum.iter_mut().zip(part(rank, call, len)).for_each(|(sum, part)| *sum += part);
    }
    rounded(&sum)
}

fn same(what: &str, got: &[f32], wanted: &[f32]) -> Result<(), String> {
    let differs = |(got, wanted): (&f32, &f32)| got.to_bits() != wanted.to_bits();
    match got.iter().zip(wanted).position(differs) {
        _ if got.len() != wanted.len() => Err(format!("{what}: {} values", got.len())),
        Some(at) => Err(format!("{what}: element {at} is {}, not {}", got[at], wanted[at])),
        None => Ok(()),
    }
}

/// Calls one after another, so that areas and flags are used again and again.
const CALLS: usize = 5;

fn sums<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for (ranks, rows, cols) in SHAPES {
        let each = on_ranks(device, ranks, CONFIG, &|device, peers| {
            let calls = (0..CALLS).map(|call| {
                let mut x = guarded(device, cols, &part(peers.rank(), call, rows * cols))?;
                device.peer_sum(peers, &mut x, None)?;
                Ok(written(device, &x))
            });
            let calls = calls.collect::<Result<Vec<_>, KernelError>>()?;
            peers.check(device.driver())?;
            Ok(calls)
        })?;
        for (rank, calls) in each.into_iter().enumerate() {
            for (call, got) in calls.into_iter().enumerate() {
                let what = format!("[{rows}, {cols}], rank {rank} of {ranks}, call {call}");
                same(&what, &got?, &sum(ranks, call, rows * cols))?;
            }
        }
    }
    Ok(())
}

fn sums_and_norms<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for (ranks, rows, cols) in SHAPES {
        let each = on_ranks(device, ranks, CONFIG, &|device, peers| {
            let weight = Tensor::from_host(device, cols, &rounded(&noise(7, cols)))?;
            let hidden = rounded(&noise(8, rows * cols));
            let mut both = Vec::new();
            for call in 0..2 {
                let mut x = guarded(device, cols, &part(peers.rank(), call, rows * cols))?;
                let mut stream = guarded(device, cols, &hidden)?;
                let mut out = unwritten(device, rows, cols)?;
                if call == 0 {
                    let (stream, out, weight) = (&mut stream, &mut out, &weight);
                    let then = AddNorm { x: stream, out, weight, eps: EPS };
                    device.peer_sum(peers, &mut x, Some(then))?;
                } else {
                    // The same numbers in two steps.
                    let mut x = guarded(device, cols, &part(peers.rank(), 0, rows * cols))?;
                    device.peer_sum(peers, &mut x, None)?;
                    device.add_rms_norm(&mut out, &mut stream, &x, &weight, EPS)?;
                }
                both.push([written(device, &stream), written(device, &out)]);
            }
            peers.check(device.driver())?;
            Ok(both)
        })?;
        for (rank, both) in each.into_iter().enumerate() {
            let both: Vec<_> = both
                .into_iter()
                .map(|pair| Ok(pair.into_iter().collect::<Result<Vec<_>, String>>()?.concat()))
                .collect::<Result<_, String>>()?;
            let what = format!("[{rows}, {cols}], rank {rank} of {ranks}");
            same(&what, &both[0], &both[1])?;
        }
    }
    Ok(())
}

/// Widths of the ranks, and rows.
const GATHERS: [(&[usize], usize); 5] =
    [(&[3, 5], 4), (&[4096, 4100], 3), (&[1, 9000, 17], 7), (&[16; 8], 33), (&[100, 90], 0)];

fn gathers<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for ((cols, rows), to_all) in GATHERS.into_iter().flat_map(|g| [(g, true), (g, false)]) {
        let total: usize = cols.iter().sum();
        let each = on_ranks(device, cols.len(), CONFIG, &|device, peers| {
            let width = cols[peers.rank()];
            let mut calls = Vec::new();
            for call in 0..CALLS {
                let values = part(peers.rank(), call, rows * width);
                let x = Tensor::exact_from_host(device, width, &values)?;
                let mut out = Tensor::exact_zeros(device, rows, total)?;
                device.peer_gather(peers, &mut out, &x, cols, to_all)?;
                let mut got = vec![0.0; rows * total];
                device.read_floats(&mut got, &out.data)?;
                calls.push(got);
            }
            peers.check(device.driver())?;
            Ok(calls)
        })?;
        for (rank, calls) in each.into_iter().enumerate() {
            for (call, got) in calls.into_iter().enumerate() {
                let mut wanted = vec![0.0; rows * total];
                let mut first = 0;
                for (of, width) in cols.iter().enumerate() {
                    let values = part(of, call, rows * width);
                    for (row, values) in values.chunks(*width).enumerate() {
                        wanted[row * total + first..][..*width].copy_from_slice(values);
                    }
                    first += width;
                }
                if !to_all && rank > 0 {
                    wanted.fill(0.0);
                }
                same(&format!("{cols:?} × {rows}, rank {rank}, call {call}"), &got, &wanted)?;
            }
        }
    }
    Ok(())
}

/// Ranks that are slow in turn: nobody is overtaken by more than a call.
fn late<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    const RANKS: usize = 3;
    for (rows, cols) in [(2, 256), (70, 256)] {
        let each = on_ranks(device, RANKS, CONFIG, &|device, peers| {
            let rank = peers.rank();
            let mut calls = Vec::new();
            for call in 0..12 {
                if (call + rank).is_multiple_of(RANKS) {
                    thread::sleep(Duration::from_millis(7));
                }
                let mut x = guarded(device, cols, &part(rank, call, rows * cols))?;
                device.peer_sum(peers, &mut x, None)?;
                calls.push(written(device, &x));
            }
            peers.check(device.driver())?;
            Ok(calls)
        })?;
        for (rank, calls) in each.into_iter().enumerate() {
            for (call, got) in calls.into_iter().enumerate() {
                let what = format!("[{rows}, {cols}], rank {rank}, call {call}");
                same(&what, &got?, &sum(RANKS, call, rows * cols))?;
            }
        }
    }
    Ok(())
}

/// A rank that stops is told by all others once the limit has passed, and later calls do not wait
/// for it again.
fn absent<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    const LIMIT: Duration = Duration::from_millis(200);
    let config = PeerConfig { limit: LIMIT, ..CONFIG };
    for (rows, cols) in [(2, 256), (70, 256)] {
        let each = on_ranks(device, 3, config, &|device, peers| {
            let mut x = Tensor::from_host(device, cols, &part(0, 0, rows * cols))?;
            device.peer_sum(peers, &mut x, None)?;
            peers.check(device.driver())?;
            if peers.rank() == 1 {
                return Ok(String::new());
            }
            for _ in 0..500 {
                device.peer_sum(peers, &mut x, None)?;
            }
            Ok(peers
                .check(device.driver())
                .map_or_else(|error| error.to_string(), |()| "ok".into()))
        })?;
        for told in [&each[0], &each[2]] {
            if !told.contains("did not take part in an exchange within 0.2 s") {
                return Err(format!("{rows} rows: {told}"));
            }
        }
    }
    Ok(())
}

fn refusals<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let told = on_ranks(device, 2, CONFIG, &|device, peers| {
        let sum = |cols: usize| {
            let mut x = Tensor::zeros(device, 1, cols)?;
            device.peer_sum(peers, &mut x, None)
        };
        let gather = |cols: &[usize]| {
            let x = Tensor::exact_zeros(device, 1, 8)?;
            let mut out = Tensor::exact_zeros(device, 1, cols.iter().sum())?;
            device.peer_gather(peers, &mut out, &x, cols, true)
        };
        let shallow = PeerConfig { area_bytes: 1 << 10, ..CONFIG };
        let region = PeerRegion::new(device.driver(), shallow)?;
        let ticket = region.ticket(device.driver())?;
        let others = Peers::map_others(device.driver(), 0, &[ticket.clone(), ticket])?;
        let narrow = Peers::new(region, 0, others);
        let mut x = Tensor::zeros(device, 1, 1024)?;
        let region = || PeerRegion::new(device.driver(), CONFIG);
        let tickets = vec![region()?.ticket(device.driver())?; 9];
        Ok([
            refused("12 columns", sum(12), "multiple of 8"),
            refused("16392 columns", sum(16392), "too long"),
            refused("a small area", device.peer_sum(&narrow, &mut x, None), "too long"),
            refused("other widths", gather(&[9, 9]), "columns [9, 9]"),
            refused("a rank more", gather(&[8, 8, 8]), "columns [8, 8, 8]"),
            refused("nine", Peers::map_others(device.driver(), 0, &tickets).map(drop), "up to 8"),
            refused("no memory", device.driver().import(&[1, 2]).map(drop), "memory"),
        ])
    })?;
    told.into_iter().flatten().collect()
}
