//! Products of every format against the plain oracle.

use super::*;
use half::{bf16, f16};
use kernels::{Format, Grouped, Groups, Scaled, Stored, plain::dequant::part_row};

/// What the numbers of a test's weight are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain(Format),
    /// Bits, and columns of a group.
    Runs(usize, usize),
    /// As `Runs`, beginning inside a group.
    Inside(usize, usize),
    /// Bits, and groups, each column in any of them.
    Listed(usize, usize),
    /// Columns with one scale.
    E4m3(usize),
}

const KINDS: [Kind; 20] = [
    Kind::Plain(Format::F32),
    Kind::Plain(Format::F16),
    Kind::Plain(Format::Bf16),
    Kind::Plain(Format::Q4_0),
    Kind::Plain(Format::Q4_1),
    Kind::Plain(Format::Q5_0),
    Kind::Plain(Format::Q5_1),
    Kind::Plain(Format::Q8_0),
    Kind::Plain(Format::Q4K),
    Kind::Plain(Format::Q5K),
    Kind::Plain(Format::Q6K),
    Kind::Runs(4, 128),
    Kind::Runs(4, 32),
    Kind::Runs(8, 64),
    Kind::Runs(8, usize::MAX),
    Kind::Inside(4, 64),
    Kind::Listed(4, 3),
    Kind::Listed(8, 5),
    Kind::E4m3(128),
    Kind::E4m3(usize::MAX),
];

/// xorshift: the tests need many different numbers, not good ones.
struct Numbers(u64);

impl Numbers {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// In [−1, 1).
    fn next(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }

    /// Rows of whole blocks: random bits, scales of a sensible size.
    fn stored(&mut self, format: Format, rows: usize, cols: usize) -> Vec<u8> {
        let blocks = rows * cols / format.block_elements();
        let mut bytes = Vec::new();
        for _ in 0..blocks {
            let mut block: Vec<u8> = (0..format.block_bytes()).map(|_| self.bits() as u8).collect();
            let halves: &[usize] = match format {
                Format::F32 | Format::F16 | Format::Bf16 => &[],
                Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
                Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
                Format::Q6K => &[208],
            };
            for &at in halves {
                block[at..at + 2].copy_from_slice(&f16::from_f32(self.next()).to_le_bytes());
            }
            match format {
                Format::F32 => block.copy_from_slice(&self.next().to_le_bytes()),
                Format::F16 => block.copy_from_slice(&f16::from_f32(self.next()).to_le_bytes()),
                Format::Bf16 => block.copy_from_slice(&bf16::from_f32(self.next()).to_le_bytes()),
                _ => {}
            }
            bytes.extend(block);
        }
        bytes
    }

    fn plain(&mut self, format: Format, rows: usize, cols: usize) -> WeightPart<'static> {
        WeightPart::plain(format, rows, cols, self.stored(format, rows, cols))
    }

    fn part(&mut self, kind: Kind, rows: usize) -> WeightPart<'static> {
        let cols = columns(kind);
        let (bits, groups) = match kind {
            Kind::Plain(format) => return self.plain(format, rows, cols),
            Kind::E4m3(run) => return self.e4m3(rows, cols, run),
            Kind::Runs(bits, size) => (bits, Groups::Runs { size, first: 0 }),
            Kind::Inside(bits, size) => (bits, Groups::Runs { size, first: 24 }),
            Kind::Listed(bits, count) => {
                let listed = (0..cols).map(|_| (self.bits() >> 20) as u32 % count as u32);
                (bits, Groups::Listed(listed.collect()))
            }
        };
        let count = (0..cols).map(|k| groups.of(k)).max().unwrap_or(0) + 1;
        let values = (0..rows * cols).map(|_| ((self.bits() >> 20) % (1 << bits)) as u8);
        let values = values.collect::<Vec<u8>>();
        let zeros = (0..rows * count).map(|_| (self.bits() >> 20) as u16 % ((1 << bits) + 1));
        let zeros = zeros.collect();
        let scales = (0..rows * count).map(|_| f16::from_f32(self.next() / 16.0)).collect();
        let values = Grouped::packed(bits, cols, &values).into();
        let stored = Stored::Grouped(Grouped { bits, values, groups, scales, zeros });
        WeightPart { rows, cols, stored }
    }

    fn e4m3(&mut self, rows: usize, cols: usize, run: usize) -> WeightPart<'static> {
        let code = |bits: u64| if bits & 0x7f == 0x7f { 0 } else { bits as u8 };
        let values = (0..rows * cols).map(|_| code(self.bits() >> 20));
        let values = values.collect::<Vec<u8>>().into();
        let scales = (0..rows * cols.div_ceil(run)).map(|_| self.next() / 256.0).collect();
        WeightPart { rows, cols, stored: Stored::Scaled(Scaled { values, run, scales }) }
    }
}

/// The rows of `parts`, as the formats mean them.
fn dequantized(parts: &[WeightPart<'_>]) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    for part in parts {
        for n in 0..part.rows {
            let mut row = vec![0.0; part.cols];
            part_row(part, n, &mut row);
            rows.push(row);
        }
    }
    rows
}

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect())
}

fn product(
    threads: usize,
    isa: Isa,
    weight: &CpuWeight,
    x: &[f32],
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let rows = x.len() / weight.cols();
    let mut out = vec![f32::NAN; rows * weight.rows()];
    let pool = Pool::new(threads).unwrap();
    let product = Product { x, rows, weight, bias };
    linear(&pool, isa, &mut LinearScratch::default(), &mut out, product).unwrap();
    out
}

/// K: no whole number of blocks where the format allows that.
fn columns(kind: Kind) -> usize {
    match kind {
        Kind::Plain(format) if format.block_elements() == 32 => 352,
        Kind::Plain(format) if format.block_elements() == 256 => 768,
        _ => 337,
    }
}

#[test]
fn packing_keeps_every_value() {
    let mut numbers = Numbers(1);
    for kind in KINDS {
        let parts = [numbers.part(kind, 19), numbers.part(kind, 1)];
        let weight = CpuWeight::pack(&parts, Precision::Exact).unwrap();
        assert_eq!(weight.rows(), 20);
        for (n, expected) in dequantized(&parts).iter().enumerate() {
            let mut row = vec![f32::NAN; weight.cols()];
            weight.read_row(n, &mut row);
            assert!(row == *expected, "{kind:?} row {n}");
        }
    }
}

/// How far `Fast` may be off: half a step of the rounded activation times each weight.
fn rounding(kind: Kind, x: &[f32], row: &[f32]) -> f64 {
    let error = |x: f32, block: &[f32]| match kind {
        Kind::Plain(Format::F32 | Format::F16) => 0.0,
        Kind::Plain(Format::Bf16) => f64::from(x.abs()) / 256.0,
        _ => f64::from(block.iter().fold(0f32, |max, x| max.max(x.abs()))) / 127.0 * 0.501,
    };
    x.chunks(32)
        .zip(row.chunks(32))
        .flat_map(|(x, w)| x.iter().zip(w).map(move |(&v, &w)| error(v, x) * f64::from(w.abs())))
        .sum()
}

fn check(kind: Kind, precision: Precision, rows: usize, numbers: &mut Numbers) {
    let parts = [numbers.part(kind, 37)];
    let weight = CpuWeight::pack(&parts, precision).unwrap();
    let (x, bias) = (numbers.floats(rows * weight.cols()), numbers.floats(37));
    let dequantized = dequantized(&parts);
    for isa in isas() {
        let out = product(1, isa, &weight, &x, Some(&bias));
        for (x, out) in x.chunks(weight.cols()).zip(out.chunks(37)) {
            for (n, row) in dequantized.iter().enumerate() {
                let terms = || x.iter().zip(row).map(|(&x, &w)| f64::from(x) * f64::from(w));
                let sum = f64::from(bias[n]) + terms().sum::<f64>();
                let mut bound = 1e-5 * (1.0 + terms().map(f64::abs).sum::<f64>());
                if precision == Precision::Fast {
                    bound += rounding(kind, x, row);
                }
                let error = (f64::from(out[n]) - sum).abs();
                assert!(
                    error <= bound,
                    "{kind:?} {precision:?} {isa:?} {rows} rows: {} for {sum}, bound {bound}",
                    out[n]
                );
            }
        }
    }
}

#[test]
fn products_are_right() {
    let mut numbers = Numbers(2);
    for kind in KINDS {
        for rows in [1, 2, 3, 15, 16, 17, 33, 100] {
            check(kind, Precision::Exact, rows, &mut numbers);
            check(kind, Precision::Fast, rows, &mut numbers);
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn a_row_is_the_same_alone_and_among_others() {
    let mut numbers = Numbers(3);
    for kind in KINDS {
        let parts = [numbers.part(kind, 53)];
        for precision in [Precision::Fast, Precision::Exact] {
            let weight = CpuWeight::pack(&parts, precision).unwrap();
            let k = weight.cols();
            let x = numbers.floats(70 * k);
            for isa in isas() {
                let all = product(1, isa, &weight, &x, None);
                assert!(bits(&all) == bits(&product(3, isa, &weight, &x, None)), "threads");
                for chunk in [1, 2, 5, 7, 12, 16, 23, 64] {
                    let parts = x.chunks(chunk * k);
                    let cut = parts.flat_map(|x| product(2, isa, &weight, x, None));
                    let cut: Vec<f32> = cut.collect();
                    assert!(bits(&all) == bits(&cut), "{kind:?} {precision:?} {isa:?} {chunk}");
                }
            }
        }
    }
}

#[test]
fn instruction_sets_agree_bit_for_bit() {
    let mut numbers = Numbers(4);
    for kind in KINDS {
        let parts = [numbers.part(kind, 21)];
        for precision in [Precision::Fast, Precision::Exact] {
            let weight = CpuWeight::pack(&parts, precision).unwrap();
            for rows in [1, 3, 40] {
                let x = numbers.floats(rows * weight.cols());
                let portable = product(1, Isa::Portable, &weight, &x, None);
                for isa in isas() {
                    if (kind, precision, isa)
                        == (Kind::Plain(Format::Bf16), Precision::Fast, Isa::Amx)
                    {
                        continue; // rounds activations
                    }
                    let out = product(1, isa, &weight, &x, None);
                    assert!(bits(&portable) == bits(&out), "{kind:?} {precision:?} {isa:?}");
                }
            }
        }
    }
}

#[test]
fn parts_of_different_formats_stack() {
    let mut numbers = Numbers(5);
    let parts = [
        numbers.plain(Format::Q5_0, 30, 256),
        numbers.plain(Format::Q8_0, 3, 256),
        numbers.plain(Format::Q6K, 18, 256),
        numbers.e4m3(7, 256, 128),
        numbers.plain(Format::Bf16, 5, 256),
        numbers.plain(Format::F32, 2, 256),
    ];
    for precision in [Precision::Fast, Precision::Exact] {
        let weight = CpuWeight::pack(&parts, precision).unwrap();
        for rows in [1, 20] {
            let x = numbers.floats(rows * 256);
            for isa in isas() {
                let out = product(2, isa, &weight, &x, None);
                let mut first = 0;
                for part in &parts {
                    let one = CpuWeight::pack(std::slice::from_ref(part), precision).unwrap();
                    let expected = product(1, isa, &one, &x, None);
                    for (row, expected) in expected.chunks(part.rows).enumerate() {
                        let found = &out[row * weight.rows() + first..][..part.rows];
                        assert!(bits(found) == bits(expected), "{:?} {isa:?}", part.stored);
                    }
                    first += part.rows;
                }
            }
        }
    }
}

#[test]
fn extreme_values_stay_in_their_rows() {
    let mut numbers = Numbers(6);
    for kind in KINDS {
        let parts = [numbers.part(kind, 18)];
        for precision in [Precision::Fast, Precision::Exact] {
            let weight = CpuWeight::pack(&parts, precision).unwrap();
            let k = weight.cols();
            let mut x = numbers.floats(20 * k);
            x[..k].fill(0.0);
            x[k..2 * k].fill(1e-42);
            x[2 * k..3 * k].fill(3e38);
            x[3 * k + 7] = f32::NAN;
            x[4 * k + 9] = f32::INFINITY;
            for isa in isas() {
                let out = product(2, isa, &weight, &x, None);
                let row = |row: usize| &out[row * 18..][..18];
                assert!(row(0).iter().all(|&v| v == 0.0), "{kind:?} {isa:?}");
                assert!(row(1).iter().all(|v| v.abs() < 1e-30), "{kind:?} {isa:?}");
                assert!(row(3).iter().all(|v| v.is_nan()), "{kind:?} {isa:?}");
                assert!(row(4).iter().all(|v| !v.is_finite()), "{kind:?} {isa:?}");
                assert!(out[5 * 18..].iter().all(|v| v.is_finite()), "{kind:?} {isa:?}");
            }
        }
    }
}

/// Every product as large as it can be, so that sums in 16 bits would show that they are too short.
#[test]
fn the_largest_products_fit_their_sums() {
    const COLS: usize = 256;
    for (bits, q) in [(4, 0), (4, 15), (8, 0), (8, 255)] {
        let groups = Groups::Runs { size: 128, first: 0 };
        let (scales, zeros) = (vec![f16::ONE; 16 * 2], vec![1; 16 * 2]);
        let values = Grouped::packed(bits, COLS, &[q; 16 * COLS]).into();
        let grouped = Grouped { bits, values, groups, scales, zeros };
        let part = WeightPart { rows: 16, cols: COLS, stored: Stored::Grouped(grouped) };
        let weight = CpuWeight::pack(&[part], Precision::Fast).unwrap();
        // Rows of 1, of −1 and of both.
        let sign = |row: usize, k: usize| match row {
            0 => 1.0,
            2 if k.is_multiple_of(2) => 1.0,
            _ => -1.0,
        };
        let x: Vec<f32> = (0..6 * COLS).map(|at| sign(at / COLS % 3, at % COLS)).collect();
        for isa in isas() {
            let out = product(1, isa, &weight, &x, None);
            for (row, sums) in out.chunks(16).enumerate() {
                let sum = [1.0, -1.0, 0.0][row % 3] * COLS as f32 * (f32::from(q) - 1.0);
                let near = |found: &f32| (found - sum).abs() <= 1e-3 * (1.0 + sum.abs());
                assert!(
                    sums.iter().all(near),
                    "{bits} bits of {q}, {isa:?}: {} for {sum}",
                    sums[0]
                );
            }
        }
    }
}

#[test]
fn empty_shapes_are_no_work() {
    let part = Numbers(7).plain(Format::Q4_0, 5, 64);
    let weight = CpuWeight::pack(&[part], Precision::Fast).unwrap();
    assert!(product(2, Isa::detect(), &weight, &[], None).is_empty());
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut numbers = Numbers(9);
    let good = numbers.plain(Format::Q4K, 4, 512);
    let refused = |part: WeightPart<'_>| {
        matches!(CpuWeight::pack(&[part], Precision::Fast), Err(KernelError::Weight(_)))
    };
    assert!(refused(WeightPart { cols: 480, ..good.clone() }));
    assert!(refused(WeightPart { cols: 0, ..good.clone() }));
    assert!(refused(WeightPart { rows: 5, ..good.clone() }));
    assert!(refused(WeightPart { rows: usize::MAX, ..good.clone() }));
    let narrow = numbers.plain(Format::Q4K, 4, 256);
    assert!(CpuWeight::pack(&[good.clone(), narrow], Precision::Fast).is_err());

    let weight = CpuWeight::pack(&[good], Precision::Fast).unwrap();
    let x = [0.0; 1024];
    let run = |out: &mut [f32], rows, bias| {
        let product = Product { x: &x, rows, weight: &weight, bias };
        linear(&Pool::new(1).unwrap(), Isa::detect(), &mut LinearScratch::default(), out, product)
    };
    assert!(run(&mut [0.0; 8], 2, None).is_ok());
    assert!(run(&mut [0.0; 7], 2, None).is_err());
    assert!(run(&mut [0.0; 12], 3, None).is_err());
    assert!(run(&mut [0.0; 8], 2, Some(&[0.0; 3])).is_err());
    assert!(run(&mut [0.0; 8], usize::MAX, None).is_err());
}
