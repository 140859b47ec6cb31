//! How fast the matrix product is: `cargo bench -p kernels --bench linear [-- FORMAT [ROWS
//! [ISA]]]`.
//!
//! A row of the table is one format and shape at one number of rows: the time of a product, the
//! weight bytes and the multiply-adds (twice that many operations) in a second. Weights rotate
//! through more memory than caches hold, as the layers of a model do. The fastest tenth of the runs
//! counts, so that a busy machine disturbs less.

use cpu::{
    Isa, Pool,
    linear::{CpuWeight, LinearScratch, Precision, Product, linear},
};
use kernels::{Format, WeightPart};
use std::{error::Error, time::Instant};

/// Bytes of weights that a decode step walks through.
const ROTATION: usize = 256 << 20;

const CASES: [(Format, usize, usize); 14] = [
    // SmolLM2-135M: attention, FFN in and out, vocabulary.
    (Format::Q4_1, 576, 960),
    (Format::Q4_1, 576, 3072),
    (Format::Q4_1, 1536, 576),
    (Format::Q8_0, 576, 49152),
    // Qwen2.5-0.5B: FFN in and out, vocabulary.
    (Format::Q5_0, 896, 9728),
    (Format::Q4K, 4864, 896),
    (Format::Q6K, 4864, 896),
    (Format::Q8_0, 896, 151_936),
    // One shape for the others.
    (Format::Q4_0, 1024, 4096),
    (Format::Q5_1, 1024, 4096),
    (Format::Q5K, 1024, 4096),
    (Format::Bf16, 1024, 4096),
    (Format::F16, 1024, 4096),
    (Format::F32, 1024, 4096),
];

/// Blocks of arbitrary bits with every scale small and normal.
fn stored(format: Format, rows: usize, cols: usize) -> Vec<u8> {
    let blocks = rows * cols / format.block_elements();
    let mut state = 1u32;
    let mut bytes: Vec<u8> = (0..blocks * format.block_bytes())
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect();
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        match format {
            Format::F32 => block.copy_from_slice(&0.01f32.to_le_bytes()),
            Format::F16 | Format::Bf16 => block[1] = 0x38,
            Format::Q6K => block[208..].copy_from_slice(&[0, 0x20]),
            Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => block[1] = 0x20,
            _ => (block[1], block[3]) = (0x20, 0x20),
        }
    }
    bytes
}

fn weight(format: Format, rows: usize, cols: usize) -> Result<CpuWeight, Box<dyn Error>> {
    let part = WeightPart::plain(format, rows, cols, stored(format, rows, cols));
    Ok(CpuWeight::pack(&[part], Precision::Fast)?)
}

struct Bench {
    pools: Vec<Pool>,
    isa: Isa,
    rows: Vec<usize>,
}

impl Bench {
    fn case(&self, format: Format, cols: usize, n: usize) -> Result<(), Box<dyn Error>> {
        let first = weight(format, n, cols)?;
        let copies = (ROTATION / first.bytes()).clamp(1, 64);
        let mut weights = vec![first];
        while weights.len() < copies {
            weights.push(weight(format, n, cols)?);
        }
        for &rows in &self.rows {
            let x: Vec<f32> = (0..rows * cols).map(|i| (i % 97) as f32 / 48.0 - 1.0).collect();
            let mut out = vec![0.0; rows * n];
            for pool in &self.pools {
                let seconds = self.measure(pool, &weights, &x, &mut out)?;
                println!(
                    "{format:>5?} {cols:>5} {n:>7} {rows:>5} {:>3} {:>11.1} {:>8.2} {:>8.0}",
                    pool.threads(),
                    seconds * 1e6,
                    weights[0].bytes() as f64 / seconds / 1e9,
                    (2 * rows * cols * n) as f64 / seconds / 1e9,
                );
            }
        }
        Ok(())
    }

    /// Seconds of one product, the fastest tenth.
    fn measure(
        &self,
        pool: &Pool,
        weights: &[CpuWeight],
        x: &[f32],
        out: &mut [f32],
    ) -> Result<f64, Box<dyn Error>> {
        let mut scratch = LinearScratch::default();
        let mut times = Vec::new();
        let started = Instant::now();
        while times.len() < 3 || started.elapsed().as_secs_f64() < 0.3 {
            let weight = &weights[times.len() % weights.len()];
            let rows = x.len() / weight.cols();
            let start = Instant::now();
            let product = Product { x, rows, weight, bias: None };
            linear(pool, self.isa, &mut scratch, out, product)?;
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 10])
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let rows = match args.get(1) {
        Some(rows) => rows.split(',').map(str::parse).collect::<Result<_, _>>()?,
        None => vec![1, 4, 16, 512],
    };
    let wanted = args.get(2).map_or(Isa::detect().name(), String::as_str);
    let isa = Isa::ALL.into_iter().find(|isa| isa.name() == wanted).ok_or("no such isa")?;
    let bench = Bench { pools: vec![Pool::new(1)?, Pool::new(2)?], isa, rows };
    println!("{}", isa.name());
    println!("format    K       N  rows  thr          us     GB/s    GOP/s");
    for (format, cols, n) in CASES {
        if args.first().is_none_or(|wanted| format!("{format:?}").eq_ignore_ascii_case(wanted)) {
            bench.case(format, cols, n)?;
        }
    }
    Ok(())
}
