//! Times of the ops around the matrix products, at the shapes of small models.
//!
//! `cargo bench -p kernels --bench ops [-- THREADS]`

use collective::{HostCollective, Threads};
use cpu::{Cpu, CpuConfig, Isa, Pool, Precision};
use kernels::{
    BLOCK_TOKENS, Backend, Batch, BatchRoom, Heads, KernelError, Rotation, Step, StepSequence,
    TableBlock, Tensor,
};
use std::{
    hint::black_box,
    thread,
    time::{Duration, Instant},
};

/// The best of many runs, in microseconds: what the machine can do when nobody disturbs it.
fn best(mut run: impl FnMut()) -> f64 {
    let (start, mut best) = (Instant::now(), Duration::MAX);
    for round in 0.. {
        let begin = Instant::now();
        run();
        best = best.min(begin.elapsed());
        if round > 20 && start.elapsed() > Duration::from_millis(300) {
            break;
        }
    }
    best.as_secs_f64() * 1e6
}

/// `rows` at the end of each of `sequences` contexts, blocks in order.
fn batch(
    d: &Cpu,
    sequences: usize,
    rows: usize,
    context: usize,
) -> Result<Batch<Cpu>, KernelError> {
    let tokens = sequences * rows;
    let heads = Heads { q: 1, kv: 1, dim: 1 };
    let room = BatchRoom { tokens, sequences, tables: sequences, context, heads };
    let mut step = Step { ids: vec![0; tokens], ..Step::default() };
    for table in 0..sequences {
        let start = context - rows;
        step.sequences.push(StepSequence { table, start, rows, rope_start: start });
        let block = |index| TableBlock { table, index, block: table * room.table_cols() + index };
        step.new_blocks.extend((0..room.table_cols()).map(block));
    }
    let mut batch = Batch::new(d, room, None)?;
    d.lay_out(&mut batch, &step)?;
    Ok(batch)
}

fn tensor(d: &Cpu, rows: usize, cols: usize) -> Result<Tensor<Cpu>, KernelError> {
    let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.7).sin()).collect();
    Tensor::from_host(d, cols, &values)
}

fn attention(d: &Cpu, heads: Heads) -> Result<(), KernelError> {
    println!("\nattention, {} query and {} key heads of {}", heads.q, heads.kv, heads.dim);
    println!(
        "{:>9} {:>6} {:>8} {:>10} {:>9} {:>19}",
        "sequences", "rows", "context", "µs", "GFLOP/s", "rotate and store µs"
    );
    let shapes =
        [(1, 1, 128), (1, 1, 1024), (1, 1, 8192), (16, 1, 512), (1, 512, 512), (1, 256, 4096)];
    for (sequences, rows, context) in shapes {
        let batch = batch(d, sequences, rows, context)?;
        let mut kv = d.kv(sequences * context.div_ceil(BLOCK_TOKENS), heads)?;
        let mut qkv = tensor(d, batch.tokens, heads.qkv_cols())?;
        let cos_sin = tensor(d, context, heads.dim)?;
        let mut out = Tensor::zeros(d, batch.tokens, heads.q * heads.dim)?;
        let mut outcome = Ok(());
        let rotation = Rotation { norm: None, cos_sin: &cos_sin, heads };
        let store = best(|| outcome = d.rotate_and_store(&mut kv, &mut qkv, &rotation, &batch));
        outcome?;
        let mut outcome = Ok(());
        let micros = best(|| outcome = d.attention(&mut out, &qkv, &kv, &batch, heads, None));
        outcome?;
        let pairs = rows * (context - rows) + rows * (rows + 1) / 2;
        let flop = (4 * sequences * pairs * heads.q * heads.dim) as f64;
        let rate = flop / micros / 1e3;
        println!("{sequences:>9} {rows:>6} {context:>8} {micros:>10.1} {rate:>9.1} {store:>19.1}");
    }
    Ok(())
}

fn small_ops(d: &Cpu) -> Result<(), KernelError> {
    let (hidden, ffn, heads) = (576, 1536, Heads { q: 9, kv: 3, dim: 64 });
    println!("\nops of one layer, hidden {hidden}, FFN {ffn}: µs");
    println!("{:>6} {:>9} {:>9} {:>9} {:>9}", "rows", "rms_norm", "rotate", "silu_mul", "add");
    for rows in [1, 16, 512] {
        let batch = batch(d, 1, rows, rows)?;
        let (x, weight) = (tensor(d, rows, hidden)?, tensor(d, 1, hidden)?);
        let (mut sum, gate_up) = (tensor(d, rows, hidden)?, tensor(d, rows, 2 * ffn)?);
        let mut qkv = tensor(d, rows, heads.qkv_cols())?;
        let table = tensor(d, rows, heads.dim)?;
        let mut kv = d.kv(rows.div_ceil(BLOCK_TOKENS), heads)?;
        let mut out = Tensor::zeros(d, rows, ffn)?;
        let mut outcomes = [Ok(()), Ok(()), Ok(()), Ok(())];
        let norm = best(|| outcomes[0] = d.rms_norm(&mut sum, &x, &weight, 1e-5));
        let rotation = Rotation { norm: None, cos_sin: &table, heads };
        let rotate =
            best(|| outcomes[1] = d.rotate_and_store(&mut kv, &mut qkv, &rotation, &batch));
        let silu = best(|| outcomes[2] = d.silu_mul(&mut out, &gate_up));
        let add = best(|| outcomes[3] = d.add(&mut sum, &x));
        outcomes.into_iter().collect::<Result<(), _>>()?;
        println!("{rows:>6} {norm:>9.2} {rotate:>9.2} {silu:>9.2} {add:>9.2}");
    }
    Ok(())
}

fn regions(threads: usize) -> std::io::Result<()> {
    let pool = Pool::new(threads)?;
    let micros = best(|| {
        for _ in 0..100 {
            pool.for_each(threads, &|_, item| {
                black_box(item);
            });
        }
    });
    println!("\nan empty region of {threads} threads: {:.2} µs", micros / 100.0);
    Ok(())
}

/// Sums of one row of 576 between ranks of one thread each.
fn all_reduce(world_size: usize) {
    let ranks = Threads::group(world_size).into_iter().map(|mut rank| {
        thread::spawn(move || {
            let mut values = [1.0; 576];
            let mut failed = None;
            let micros = best_of_fixed(200, || {
                for _ in 0..100 {
                    failed = rank.all_reduce_sum(black_box(&mut values)).err().or(failed.take());
                }
            });
            (micros / 100.0, failed)
        })
    });
    let ranks: Vec<_> = ranks.collect();
    for (rank, done) in ranks.into_iter().map(thread::JoinHandle::join).enumerate() {
        match done {
            Ok((micros, None)) if rank == 0 => {
                println!("a sum over {world_size} ranks of 576 floats: {micros:.2} µs");
            }
            Ok((_, None)) => {}
            Ok((_, Some(error))) => println!("rank {rank}: {error}"),
            Err(_) => println!("rank {rank} panicked"),
        }
    }
}

/// As `best`, the same number of runs on every rank.
fn best_of_fixed(runs: usize, mut run: impl FnMut()) -> f64 {
    let once = |_| {
        let begin = Instant::now();
        run();
        begin.elapsed()
    };
    (0..runs).map(once).min().unwrap_or_default().as_secs_f64() * 1e6
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(2);
    let isa = Isa::detect();
    let device = Cpu::new(CpuConfig { threads, precision: Precision::Fast, isa })?;
    println!("{} threads, {}", device.threads(), device.isa().name());
    regions(threads)?;
    all_reduce(2);
    small_ops(&device)?;
    attention(&device, Heads { q: 9, kv: 3, dim: 64 })?;
    attention(&device, Heads { q: 14, kv: 2, dim: 64 })?;
    attention(&device, Heads { q: 32, kv: 8, dim: 128 })?;
    Ok(())
}
