//! Products with 4-bit weights: shapes, groups, ranges that begin inside one, permuted
//! columns; the same bits in every batch of up to as many rows as records are multiplied with.

use crate::{BF16, Check, Device, Tolerance, compare, noise, rounded};
use cuda::{Cuda, Driver, RECORDS_ROWS_MAX};
use half::{bf16, f16};
use kernels::{Backend, Grouped, Groups, KernelError, Stored, Tensor, WeightPart};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "int4 shapes", run: shapes },
        Check { name: "int4 many columns", run: many_columns },
        Check { name: "int4 ranges", run: ranges },
        Check { name: "int4 stacked parts", run: stacked },
        Check { name: "int4 permuted columns", run: permuted },
        Check { name: "int4 extreme numbers", run: extremes },
        Check { name: "int4 batches", run: batches },
    ]
}

/// Written where no op may write.
const CANARY: f32 = 77.0;

/// A quantised matrix [rows, cols], and where its columns lie in the groups.
#[derive(Clone)]
pub(crate) struct Matrix {
    rows: usize,
    cols: usize,
    group: usize,
    first_col: usize,
    /// Of each column, where they are permuted.
    pub column_groups: Option<Vec<usize>>,
    /// [rows, cols]
    quants: Vec<u8>,
    /// [groups, rows]
    zeros: Vec<u8>,
    /// [groups, rows]
    scales: Vec<f16>,
}

impl Matrix {
    pub fn new(seed: u64, [rows, cols, group, first_col]: [usize; 4]) -> Self {
        let groups = (first_col + cols).div_ceil(group);
        let nibbles = |seed, len| -> Vec<u8> {
            noise(seed, len).iter().map(|v| ((v + 1.0) * 8.0) as u8 & 15).collect()
        };
        let scale = |v: &f32| f16::from_f32((v + 1.5) / 64.0);
        Self {
            rows,
            cols,
            group,
            first_col,
            column_groups: None,
            quants: nibbles(seed, rows * cols),
            zeros: nibbles(seed + 1, groups * rows),
            scales: noise(seed + 2, groups * rows).iter().map(scale).collect(),
        }
    }

    fn group_of(&self, col: usize) -> usize {
        match &self.column_groups {
            Some(groups) => groups[col],
            None => (self.first_col + col) / self.group,
        }
    }

    /// Exact in f32.
    pub fn weight(&self, row: usize, col: usize) -> f32 {
        let at = self.group_of(col) * self.rows + row;
        let steps = f32::from(self.quants[row * self.cols + col]) - f32::from(self.zeros[at]);
        steps * self.scales[at].to_f32()
    }

    /// x · Wᵀ in f64, the weights rounded to bf16 where `rounding`.
    fn product(&self, x: &[f32], rounding: bool) -> Vec<f32> {
        let round = |w: f32| if rounding { bf16::from_f32(w).to_f32() } else { w };
        let weights: Vec<f64> = (0..self.rows * self.cols)
            .map(|i| f64::from(round(self.weight(i / self.cols, i % self.cols))))
            .collect();
        let sum = |x: &[f32], row: usize| -> f32 {
            let weights = &weights[row * self.cols..][..self.cols];
            x.iter().zip(weights).map(|(x, w)| f64::from(*x) * w).sum::<f64>() as f32
        };
        x.chunks_exact(self.cols)
            .flat_map(|x| (0..self.rows).map(move |r| (x, r)))
            .map(|(x, r)| sum(x, r))
            .collect()
    }

    pub fn part(&self) -> WeightPart<'static> {
        let (rows, cols) = (self.rows, self.cols);
        let groups = match &self.column_groups {
            Some(groups) => Groups::Listed(groups.iter().map(|group| *group as u32).collect()),
            None => Groups::Runs { size: self.group, first: self.first_col },
        };
        // By row, as the kernels' form has them.
        let count = self.zeros.len() / rows;
        let at = || (0..rows).flat_map(move |row| (0..count).map(move |g| g * rows + row));
        let scales = at().map(|at| self.scales[at]).collect();
        let zeros = at().map(|at| u16::from(self.zeros[at])).collect();
        let values = Grouped::packed(4, cols, &self.quants).into();
        let stored = Stored::Grouped(Grouped { bits: 4, values, groups, scales, zeros });
        WeightPart { rows, cols, stored }
    }
}

/// A product on the device, twice: what the first one leaves behind must not reach the second. Rows
/// past the last are looked at too.
fn product<D: Driver>(
    device: &Cuda<D>,
    parts: &[WeightPart<'_>],
    (x, cols): (&[f32], usize),
    mut out: Tensor<Cuda<D>>,
    bias: Option<&[f32]>,
) -> Result<Vec<f32>, KernelError> {
    let rows: usize = parts.iter().map(|part| part.rows).sum();
    let weight = device.weight(parts)?;
    let mut x = Tensor::from_host(device, cols, &[x, &vec![f32::NAN; cols]].concat())?;
    x.rows -= 1;
    let bias = bias.map(|bias| Tensor::from_host(device, rows, bias)).transpose()?;
    let mut got = vec![CANARY; (x.rows + 1) * rows];
    out.rows = x.rows;
    for _ in 0..2 {
        device.write_floats(&mut out.data, &vec![CANARY; got.len()])?;
        device.linear(&mut out, &x, &weight, bias.as_ref())?;
    }
    device.read_floats(&mut got, &out.data)?;
    Ok(got)
}

/// A product in f32, and the same in bf16 with a bias, which it is compared with.
fn run<D: Driver>(
    device: &Cuda<D>,
    parts: &[WeightPart<'_>],
    (x, cols): (&[f32], usize),
    bias: Option<&[f32]>,
) -> Result<Vec<f32>, String> {
    let rows: usize = parts.iter().map(|part| part.rows).sum();
    let tokens = x.len() / cols;
    let text = |error: KernelError| error.to_string();
    let out = Tensor::exact_zeros(device, tokens + 1, rows).map_err(text)?;
    let mut exact = product(device, parts, (x, cols), out, None).map_err(text)?;
    let out = Tensor::zeros(device, tokens + 1, rows).map_err(text)?;
    let mut narrow = product(device, parts, (x, cols), out, bias).map_err(text)?;
    for past in [exact.split_off(tokens * rows), narrow.split_off(tokens * rows)] {
        if past.iter().any(|&v| v != CANARY) {
            return Err("a row past the last was written".into());
        }
    }
    let of = |row: usize| bias.map_or(0.0, |bias| bias[row]);
    let biased: Vec<f32> = exact.iter().enumerate().map(|(at, v)| v + of(at % rows)).collect();
    // The device's own product may add in another order for another type of output.
    let tolerance = Tolerance::UlpsOr(1, 1e-6 * cols as f32);
    compare("bf16 with a bias beside f32", &narrow, &biased, tolerance)?;
    Ok(exact)
}

/// The product of `tokens` rows against the oracle.
fn check<D: Driver>(device: &Cuda<D>, matrix: &Matrix, tokens: usize) -> Result<(), String> {
    let what = format!(
        "[{}, {}] in groups of {} from {}, {tokens} tokens",
        matrix.rows, matrix.cols, matrix.group, matrix.first_col
    );
    let x = rounded(&noise(9, tokens * matrix.cols));
    let bias = rounded(&noise(10, matrix.rows));
    let got = run(device, &[matrix.part()], (&x, matrix.cols), Some(&bias));
    let got = got.map_err(|error| format!("{what}: {error}"))?;
    let wanted = matrix.product(&x, tokens > RECORDS_ROWS_MAX);
    // f32 sums of values of order 1: the order of the additions is all that differs.
    compare(&what, &got, &wanted, Tolerance::Absolute(1e-6 * matrix.cols as f32))
}

fn shapes<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let cases = [
        ([8, 128, 128, 0], vec![1, 2, 193]),
        ([264, 256, 64, 0], vec![7, 16]),
        ([72, 256, 32, 0], vec![8, 17, 64]),
        ([320, 136, 64, 0], vec![9]),
        ([16, 512, 128, 0], vec![33, 130, 200]),
        ([8, 96, 32, 0], vec![1, 32, 66, 194]),
        ([16, 768, 256, 0], vec![3]),
        ([16, 200, 200, 0], vec![4, 70]),
    ];
    for (seed, (shape, tokens)) in cases.into_iter().enumerate() {
        let mut matrix = Matrix::new(seed as u64 + 20, shape);
        if seed % 2 == 0 {
            // GPTQ's zero points are 1 to 16.
            matrix.zeros.iter_mut().for_each(|zero| *zero += 1);
        }
        for tokens in tokens {
            check(&device, &matrix, tokens)?;
        }
    }
    Ok(())
}

/// Enough stages in each of the most splits to fill the ring of stages again.
fn many_columns<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    check(&device, &Matrix::new(1, [8, 10368, 128, 0]), 3)?;
    check(&device, &Matrix::new(2, [8, 8336, 32, 16]), 16)?;
    check(&device, &Matrix::new(3, [8, 8320, 64, 0]), 20)
}

/// Columns that begin and end inside groups, and inside the slots of 32 columns.
fn ranges<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let cases = [
        ([8, 144, 128, 112], vec![5, 70]),
        ([16, 232, 128, 8], vec![12]),
        ([8, 40, 64, 56], vec![1, 40]),
        ([72, 216, 32, 24], vec![2]),
        ([8, 216, 32, 24], vec![67, 195]),
        ([8, 264, 128, 328], vec![8]),
        ([8, 8, 32, 24], vec![1, 65, 193]),
    ];
    for (shape, tokens) in cases {
        for tokens in tokens {
            check(&device, &Matrix::new(40, shape), tokens)?;
        }
    }
    check(&device, &Matrix::new(41, [16, 120, 64, 40]), 6)
}

/// Parts whose seams lie inside strips, no bias.
fn stacked<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let matrices = [40, 8, 24].map(|rows| Matrix::new(rows as u64, [rows, 256, 128, 0]));
    let parts = matrices.each_ref().map(Matrix::part);
    for tokens in [4, 194] {
        let x = rounded(&noise(5, tokens * 256));
        let got = run(&device, &parts, (&x, 256), None)?;
        let rounding = tokens > RECORDS_ROWS_MAX;
        let each = matrices.each_ref().map(|m| m.product(&x, rounding));
        let row = |t: usize| {
            matrices.iter().zip(&each).flat_map(move |(m, out)| &out[t * m.rows..][..m.rows])
        };
        let wanted: Vec<f32> = (0..tokens).flat_map(row).copied().collect();
        compare(&format!("stacked, {tokens} tokens"), &got, &wanted, Tolerance::Absolute(3e-4))?;
    }
    Ok(())
}

/// Act-order: whole groups out of order, and a rank's share of groups of every size.
fn permuted<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for (cols, group, stride) in [(256, 128, 2), (192, 64, 3), (80, 128, 3)] {
        let mut matrix = Matrix::new(50, [24, cols, group, 0]);
        let groups = matrix.zeros.len() / matrix.rows;
        matrix.column_groups = Some((0..cols).map(|k| k * stride / 7 % groups).collect());
        for tokens in [1, 10, 65, 193] {
            check(&device, &matrix, tokens)?;
        }
    }
    Ok(())
}

/// The ends of the nibble's range against the ends of the zero point's, scales of zero, tiny and
/// large ones; a column that meets every combination is exact to the last bit.
fn extremes<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for zeros in [[1, 16], [0, 15]] {
        let mut matrix = Matrix::new(60, [32, 128, 32, 0]);
        // The smallest f16 above zero, the largest, and zero.
        let scales = [0x0001, 0x7bff, 0x0000, 0x3c00].map(f16::from_bits);
        for (at, quant) in matrix.quants.iter_mut().enumerate() {
            *quant = [0, 15][at % 2];
        }
        for (at, (zero, scale)) in matrix.zeros.iter_mut().zip(&mut matrix.scales).enumerate() {
            (*zero, *scale) = (zeros[at % 2], scales[at / 2 % 4]);
        }
        // One column a token: its weights, as they are.
        for col in [0, 31, 77, 126] {
            let x: Vec<f32> = (0..128).map(|k| if k == col { 1.0 } else { 0.0 }).collect();
            let got = run(&device, &[matrix.part()], (&x, 128), None)?;
            let wanted: Vec<f32> = (0..32).map(|row| matrix.weight(row, col)).collect();
            let what = format!("zero points {zeros:?}, column {col}");
            compare(&what, &got, &wanted, Tolerance::Absolute(0.0))?;
        }
    }
    Ok(())
}

/// A row's bits are the same alone and among others, in whatever tile.
fn batches<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let matrix = Matrix::new(70, [24, 520, 128, 0]);
    let x = rounded(&noise(71, RECORDS_ROWS_MAX * matrix.cols));
    let multiply = |tokens: std::ops::Range<usize>| {
        let x = &x[tokens.start * matrix.cols..tokens.end * matrix.cols];
        run(&device, &[matrix.part()], (x, matrix.cols), None)
    };
    let all = multiply(0..RECORDS_ROWS_MAX)?;
    for tokens in [0..1, 63..64, 30..37, 0..8, 5..14, 48..64, 1..18, 20..53] {
        let got = multiply(tokens.clone())?;
        let wanted = &all[tokens.start * matrix.rows..tokens.end * matrix.rows];
        let differs = got.iter().zip(wanted).position(|(a, b)| a.to_bits() != b.to_bits());
        if let Some(at) = differs {
            return Err(format!(
                "token {} of {tokens:?}, row {}: {} alone, {} among others",
                tokens.start + at / matrix.rows,
                at % matrix.rows,
                got[at],
                wanted[at]
            ));
        }
    }
    Ok(())
}
