//! Ops on rows, and products, against the plain ones.

use cpu::{Cpu, CpuConfig, Isa, Precision};
use kernels::{BLOCK_TOKENS, Backend, Batch, Heads, Rotation, Tensor, plain::Plain};

use crate::common::{Random, assert_close, devices, f32_weight, floats, host, ints, no_batch};
use crate::paged::heads;

/// Runs `op` on every device and compares with the plain one.
macro_rules! same_as_plain {
    ($tolerance:expr, |$device:ident| $op:expr) => {{
        let want = {
            let $device = &Plain;
            $op
        };
        for (name, device) in devices() {
            let $device = &device;
            assert_close(&name, &$op, &want, $tolerance);
        }
    }};
}

#[test]
fn rms_norm_is_the_plain_one() {
    for (rows, cols) in [(1, 1), (3, 16), (2, 63), (5, 576), (100, 896), (0, 32)] {
        let mut random = Random(cols as u64);
        let (x, weight) = (random.floats(rows * cols), random.floats(cols));
        same_as_plain!(3e-6, |d| {
            let x = Tensor::from_host(d, cols, &x).unwrap();
            let weight = Tensor::from_host(d, cols, &weight).unwrap();
            let mut out = Tensor::zeros(d, rows, cols).unwrap();
            d.rms_norm(&mut out, &x, &weight, 1e-5).unwrap();
            host(d, &out)
        });
    }
}

/// One sequence's rows, and how they are turned.
struct Turned {
    heads: Heads,
    x: Vec<f32>,
    norm: Option<[Vec<f32>; 2]>,
    /// Rows of a table, and which is each token's.
    cos_sin: Vec<f32>,
    rope_rows: Vec<i32>,
    q_scale: Option<Vec<f32>>,
}

impl Turned {
    /// The query heads that are left, and attention over the keys and values that were stored.
    fn run<B: Backend>(&self, d: &B) -> [Vec<f32>; 2] {
        let (heads, tokens) = (self.heads, self.rope_rows.len());
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        let each: Vec<i32> = (0..tokens as i32).collect();
        let batch = Batch {
            tokens,
            sequences: 1,
            positions: ints(d, &each),
            rope_rows: ints(d, &self.rope_rows),
            slots: ints(d, &each),
            row_starts: ints(d, &[0, tokens as i32]),
            context_lens: ints(d, &[tokens as i32]),
            tables: ints(d, &[0]),
            block_tables: ints(d, &each[..blocks]),
            block_table_cols: blocks,
            q_scale: self.q_scale.as_ref().map(|scale| floats(d, scale)),
            ..no_batch(d)
        };
        let vector = |values: &Vec<f32>| Tensor::from_host(d, heads.dim, values).unwrap();
        let (cos_sin, norm) = (vector(&self.cos_sin), self.norm.as_ref());
        let norm = norm.map(|[q, k]| (vector(q), vector(k)));
        let norm = norm.as_ref().map(|(q, k)| (q, k, 1e-6));
        let rotation = Rotation { norm, cos_sin: &cos_sin, heads };
        let mut kv = d.kv(blocks, heads).unwrap();
        let mut qkv = Tensor::from_host(d, heads.qkv_cols(), &self.x).unwrap();
        d.rotate_and_store(&mut kv, &mut qkv, &rotation, &batch).unwrap();
        let mut out = Tensor::zeros(d, tokens, heads.q * heads.dim).unwrap();
        d.attention(&mut out, &qkv, &kv, &batch, heads, None).unwrap();
        let qkv = host(d, &qkv);
        let queries = qkv.chunks_exact(heads.qkv_cols()).map(|row| &row[..heads.q * heads.dim]);
        [queries.flatten().copied().collect(), host(d, &out)]
    }
}

#[test]
fn rotate_and_store_is_the_plain_one() {
    let shapes =
        [(heads(9, 3, 64), 1), (heads(2, 1, 128), 90), (heads(1, 1, 6), 4), (heads(16, 8, 48), 70)];
    for (heads, tokens) in shapes {
        for (normed, scaled) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut random = Random(tokens as u64);
            let turned = Turned {
                heads,
                x: random.floats(tokens * heads.qkv_cols()),
                norm: normed.then(|| [random.floats(heads.dim), random.floats(heads.dim)]),
                cos_sin: random.floats(50 * heads.dim),
                rope_rows: (0..tokens).map(|_| (random.next() % 50) as i32).collect(),
                q_scale: scaled.then(|| random.floats(tokens)),
            };
            let want = turned.run(&Plain);
            for (name, device) in devices() {
                let got = turned.run(&device);
                assert_close(&name, &got[0], &want[0], 3e-6);
                // Fast keeps keys and values in half precision.
                let fast = device.precision() == Precision::Fast;
                assert_close(&name, &got[1], &want[1], if fast { 2e-3 } else { 5e-6 });
            }
        }
    }
}

#[test]
fn silu_mul_and_add_are_the_plain_ones() {
    for (rows, cols) in [(1, 1), (1, 1536), (16, 100), (64, 1536), (3, 17), (0, 8)] {
        let mut random = Random(rows as u64);
        let mut x = random.floats(rows * 2 * cols);
        x.iter_mut().enumerate().for_each(|(i, x)| *x *= [1.0, 20.0, 100.0][i % 3]);
        same_as_plain!(1e-6, |d| {
            let x = Tensor::from_host(d, 2 * cols, &x).unwrap();
            let mut out = Tensor::zeros(d, rows, cols).unwrap();
            d.silu_mul(&mut out, &x).unwrap();
            host(d, &out)
        });
        same_as_plain!(0.0, |d| {
            let mut sum = Tensor::from_host(d, cols, &x[..rows * cols]).unwrap();
            let delta = Tensor::from_host(d, cols, &x[rows * cols..]).unwrap();
            d.add(&mut sum, &delta).unwrap();
            host(d, &sum)
        });
    }
}

#[test]
fn embed_and_gather_rows_are_the_plain_ones() {
    let cols = 96;
    let table = Random(4).floats(50 * cols);
    let ids: Vec<i32> = vec![7, 100, 149, 150, 99, 0, -1, i32::MAX, 120, 120];
    same_as_plain!(0.0, |d| {
        let table = f32_weight(d, cols, &table);
        let batch = Batch {
            tokens: ids.len(),
            ids: ints(d, &ids),
            logit_rows: ints(d, &[9, 0, 1, 8, 2]),
            logit_rows_len: 5,
            ..no_batch(d)
        };
        let mut x = Tensor::zeros(d, ids.len(), cols).unwrap();
        d.embed(&mut x, &table, 100, &batch).unwrap();
        let mut out = Tensor::zeros(d, 3, cols).unwrap();
        d.gather_rows(&mut out, &x, &batch, 1, 3).unwrap();
        let mut all = host(d, &x);
        assert_eq!(&all[..cols], &vec![0.0; cols][..]);
        assert_eq!(&host(d, &out)[..cols], &all[..cols]);
        all.extend(host(d, &out));
        all
    });
}

#[test]
fn linear_is_the_plain_one() {
    let (rows, k, n) = (5, 64, 40);
    let mut random = Random(8);
    let (x, w, bias) = (random.floats(rows * k), random.floats(n * k), random.floats(n));
    same_as_plain!(1e-5, |d| {
        let x = Tensor::from_host(d, k, &x).unwrap();
        let weight = f32_weight(d, k, &w);
        let bias = Tensor::from_host(d, n, &bias).unwrap();
        let mut out = Tensor::zeros(d, rows, n).unwrap();
        d.linear(&mut out, &x, &weight, Some(&bias)).unwrap();
        host(d, &out)
    });
}

#[test]
fn rows_past_those_in_use_stay_as_they_are() {
    let device =
        Cpu::new(CpuConfig { threads: 2, precision: Precision::Exact, isa: Isa::detect() })
            .unwrap();
    let mut x = Tensor::from_host(&device, 4, &[1.0; 12]).unwrap();
    let mut delta = Tensor::from_host(&device, 4, &[2.0; 12]).unwrap();
    (x.rows, delta.rows) = (2, 2);
    device.add(&mut x, &delta).unwrap();
    x.rows = 3;
    assert_eq!(host(&device, &x), [[3.0; 8].as_slice(), &[1.0; 4]].concat());
}
