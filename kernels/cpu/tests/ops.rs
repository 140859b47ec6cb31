//! Every op of every CPU level against the plain backend, and what attention promises bit for bit.

use cpu::{Cpu, CpuConfig, Isa, Precision};
use kernels::{
    BLOCK_TOKENS, Backend, Batch, Format, Heads, KernelError, Rotation, Tensor, WeightPart,
    plain::Plain,
};

/// Multiples of 1/1024 in [-1, 1): exact in half precision, so that both precisions agree on
/// inputs.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    fn float(&mut self) -> f32 {
        (self.next() % 2048) as f32 / 1024.0 - 1.0
    }
    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }
}

/// Every level this machine has, both precisions, one to three threads.
fn devices() -> Vec<(String, Cpu)> {
    let mut devices = Vec::new();
    for isa in Isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect()) {
        for precision in [Precision::Fast, Precision::Exact] {
            for threads in 1..=3 {
                let name = format!("{isa:?} {precision:?} {threads}");
                devices.push((name, Cpu::new(CpuConfig { threads, precision, isa }).unwrap()));
            }
        }
    }
    devices
}

fn host<B: Backend>(device: &B, tensor: &Tensor<B>) -> Vec<f32> {
    let mut values = vec![0.0; tensor.rows * tensor.cols];
    device.read_floats(&mut values, &tensor.data).unwrap();
    values
}

#[track_caller]
fn assert_close(name: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got - want).abs();
        assert!(error <= tolerance * want.abs().max(1.0), "{name} [{i}]: {got}, wanted {want}");
    }
}

#[track_caller]
fn assert_same_bits(name: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.to_bits(), want.to_bits(), "{name} [{i}]: {got}, wanted {want}");
    }
}

/// A batch whose every buffer is empty.
fn no_batch<B: Backend>(device: &B) -> Batch<B> {
    let ints = || device.ints(0).unwrap();
    Batch {
        tokens: 0,
        sequences: 0,
        logit_rows_len: 0,
        ids: ints(),
        positions: ints(),
        rope_rows: ints(),
        slots: ints(),
        row_starts: device.ints(1).unwrap(),
        context_lens: ints(),
        block_tables: ints(),
        block_table_cols: 0,
        logit_rows: ints(),
        q_scale: None,
        cuts: device.cuts(0, 0).unwrap(),
    }
}

fn ints<B: Backend>(device: &B, values: &[i32]) -> B::Ints {
    let mut to = device.ints(values.len()).unwrap();
    device.write_ints(&mut to, values).unwrap();
    to
}

fn floats<B: Backend>(device: &B, values: &[f32]) -> B::Floats {
    let mut to = device.floats(values.len()).unwrap();
    device.write_floats(&mut to, values).unwrap();
    to
}

fn f32_weight<B: Backend>(device: &B, cols: usize, values: &[f32]) -> B::Weight {
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let rows = values.len() / cols;
    device.weight(&[WeightPart::plain(Format::F32, rows, cols, data)]).unwrap()
}

/// A table [1, D] of a turn by nothing: rows are stored as they are.
fn no_turn<B: Backend>(device: &B, dim: usize) -> Tensor<B> {
    let cos_sin: Vec<f32> = (0..dim).map(|i| if i < dim / 2 { 1.0 } else { 0.0 }).collect();
    Tensor::from_host(device, dim, &cos_sin).unwrap()
}

/// Sequences in one cache whose unused slots hold NaN.
struct Paged {
    heads: Heads,
    blocks: usize,
    /// Packed rows of every token of each sequence.
    qkv: Vec<Vec<f32>>,
    tables: Vec<Vec<i32>>,
}

impl Paged {
    fn new(heads: Heads, contexts: &[usize], seed: u64) -> Self {
        let mut random = Random(seed);
        let needed: usize = contexts.iter().map(|c| c.div_ceil(BLOCK_TOKENS)).sum();
        let blocks = needed + 3;
        let mut free: Vec<i32> = (0..blocks as i32).collect();
        let mut take = |random: &mut Random| free.swap_remove(random.next() as usize % free.len());
        let mut tables = Vec::new();
        for context in contexts {
            let blocks = context.div_ceil(BLOCK_TOKENS);
            tables.push((0..blocks).map(|_| take(&mut random)).collect());
        }
        let qkv = contexts.iter().map(|c| random.floats(c * heads.qkv_cols())).collect();
        Self { heads, blocks, qkv, tables }
    }

    /// The given rows of the given sequences; each context ends where its rows end.
    fn batch<B: Backend>(&self, device: &B, rows: &[(usize, std::ops::Range<usize>)]) -> Batch<B> {
        let cols = self.tables.iter().map(Vec::len).max().unwrap_or(0) + 1;
        let (mut positions, mut slots, mut tables) = (vec![], vec![], vec![]);
        let (mut starts, mut contexts) = (vec![0], vec![]);
        for (sequence, rows) in rows {
            let table = &self.tables[*sequence];
            for position in rows.clone() {
                let block = table[position / BLOCK_TOKENS];
                positions.push(position as i32);
                slots.push(block * BLOCK_TOKENS as i32 + (position % BLOCK_TOKENS) as i32);
            }
            starts.push(positions.len() as i32);
            contexts.push(rows.end as i32);
            let used = rows.end.div_ceil(BLOCK_TOKENS);
            // What lies past a sequence's own blocks is nobody's block.
            tables.extend((0..cols).map(|i| if i < used { table[i] } else { i32::MIN }));
        }
        Batch {
            tokens: positions.len(),
            sequences: rows.len(),
            positions: ints(device, &positions),
            rope_rows: ints(device, &vec![0; positions.len()]),
            slots: ints(device, &slots),
            row_starts: ints(device, &starts),
            context_lens: ints(device, &contexts),
            block_tables: ints(device, &tables),
            block_table_cols: cols,
            ..no_batch(device)
        }
    }

    fn rows<B: Backend>(&self, device: &B, rows: &[(usize, std::ops::Range<usize>)]) -> Tensor<B> {
        let cols = self.heads.qkv_cols();
        let values: Vec<f32> = rows
            .iter()
            .flat_map(|(s, rows)| &self.qkv[*s][rows.start * cols..rows.end * cols])
            .copied()
            .collect();
        Tensor::from_host(device, cols, &values).unwrap()
    }

    /// A cache of NaN everywhere but in the positions below `ends`.
    fn cache<B: Backend>(&self, device: &B, ends: &[usize]) -> B::Kv {
        let heads = self.heads;
        let mut kv = device.kv(self.blocks, heads).unwrap();
        let slots: Vec<i32> = (0..(self.blocks * BLOCK_TOKENS) as i32).collect();
        let batch = Batch {
            tokens: slots.len(),
            slots: ints(device, &slots),
            rope_rows: ints(device, &vec![0; slots.len()]),
            ..no_batch(device)
        };
        let cos_sin = no_turn(device, heads.dim);
        let rotation = Rotation { norm: None, cos_sin: &cos_sin, heads };
        let nan = vec![f32::NAN; slots.len() * heads.qkv_cols()];
        let mut nan = Tensor::from_host(device, heads.qkv_cols(), &nan).unwrap();
        device.rotate_and_store(&mut kv, &mut nan, &rotation, &batch).unwrap();
        for (sequence, &end) in ends.iter().enumerate() {
            // In uneven pieces, so that whole blocks and parts of them are stored.
            for piece in (0..end).step_by(21) {
                let rows = [(sequence, piece..end.min(piece + 21))];
                let (batch, mut qkv) = (self.batch(device, &rows), self.rows(device, &rows));
                device.rotate_and_store(&mut kv, &mut qkv, &rotation, &batch).unwrap();
            }
        }
        kv
    }

    /// Attention of the given rows, the cache holding every sequence's positions up to them.
    fn attend<B: Backend>(
        &self,
        device: &B,
        rows: &[(usize, std::ops::Range<usize>)],
        window: Option<usize>,
    ) -> Vec<f32> {
        let mut ends = vec![0; self.qkv.len()];
        rows.iter().for_each(|(s, rows)| ends[*s] = rows.end);
        let kv = self.cache(device, &ends);
        let batch = self.batch(device, rows);
        let qkv = self.rows(device, rows);
        let out_cols = self.heads.q * self.heads.dim;
        let mut out = Tensor::zeros(device, batch.tokens, out_cols).unwrap();
        device.attention(&mut out, &qkv, &kv, &batch, self.heads, window).unwrap();
        host(device, &out)
    }
}

const fn heads(q: usize, kv: usize, dim: usize) -> Heads {
    Heads { q, kv, dim }
}

#[test]
fn attention_is_the_plain_one() {
    let shapes = [heads(9, 3, 64), heads(1, 1, 128), heads(8, 1, 32), heads(14, 2, 64)];
    let devices = devices();
    let odd = [heads(4, 2, 48), heads(2, 2, 96), heads(5, 1, 2), heads(40, 1, 10)];
    for (seed, heads) in shapes.into_iter().chain(odd).enumerate() {
        let paged = Paged::new(heads, &[1, 15, 16, 17, 63, 64, 65, 130], seed as u64);
        let batches: [&[(usize, std::ops::Range<usize>)]; 5] = [
            &[(0, 0..1)],
            &[(7, 129..130), (3, 16..17), (1, 14..15)],
            &[(7, 0..130)],
            &[(0, 0..1), (4, 5..63), (2, 16..16), (5, 63..64), (6, 1..65), (1, 0..15)],
            &[],
        ];
        for (i, rows) in batches.into_iter().enumerate() {
            for window in [None, Some([1, 16][i % 2]), Some(37)] {
                let want = paged.attend(&Plain, rows, window);
                // Every level and precision, one of the thread counts.
                for (name, device) in devices.iter().skip((seed + i) % 3).step_by(3) {
                    let got = paged.attend(device, rows, window);
                    let name = format!("{name} {heads:?} {rows:?} {window:?}");
                    assert_close(&name, &got, &want, 5e-6);
                }
            }
        }
    }
}

#[test]
fn attention_over_a_long_context_is_the_plain_one() {
    let paged = Paged::new(heads(6, 2, 64), &[5000], 3);
    for window in [None, Some(700)] {
        let rows = [(0, 4990..5000)];
        let want = paged.attend(&Plain, &rows, window);
        for (name, device) in devices() {
            assert_close(&name, &paged.attend(&device, &rows, window), &want, 5e-6);
        }
    }
}

#[test]
fn scores_far_apart_stay_finite() {
    let mut paged = Paged::new(heads(2, 1, 16), &[100], 5);
    // Scores of up to 1e6: all weight falls on one key, wherever it stands.
    paged.qkv[0].iter_mut().for_each(|x| *x *= 512.0);
    let want = paged.attend(&Plain, &[(0, 90..100)], None);
    for (name, device) in devices() {
        assert_close(&name, &paged.attend(&device, &[(0, 90..100)], None), &want, 1e-4);
    }
}

#[test]
fn a_rows_attention_depends_on_nothing_else() {
    for (heads, window) in [
        (heads(9, 3, 64), None),
        (heads(7, 1, 64), Some(50)),
        (heads(2, 2, 48), Some(65)),
        (heads(8, 2, 128), None),
    ] {
        let contexts = [200, 70, 1, 33];
        let paged = Paged::new(heads, &contexts, 11);
        let cols = heads.q * heads.dim;
        for precision in [Precision::Fast, Precision::Exact] {
            let cpu = |isa, threads| Cpu::new(CpuConfig { threads, precision, isa }).unwrap();
            let whole = paged.attend(&cpu(Isa::Amx, 1), &[(0, 0..200)], window);
            for (isa, threads) in Isa::ALL.into_iter().zip([3, 1, 2, 3]) {
                let device = cpu(isa, threads);
                let name = format!("{isa:?} {precision:?} {threads} {heads:?}");
                let again = paged.attend(&device, &[(0, 0..200)], window);
                assert_same_bits(&name, &again, &whole);
                for chunk in [1, 7, 64] {
                    let start = 200 - chunk;
                    let rows = [(1, 3..70), (0, start..200), (2, 0..1), (3, 30..33)];
                    let among = paged.attend(&device, &rows, window);
                    let among = &among[67 * cols..][..chunk * cols];
                    assert_same_bits(&name, among, &whole[start * cols..]);
                    let alone = paged.attend(&device, &rows[1..2], window);
                    assert_same_bits(&name, &alone, &whole[start * cols..]);
                }
            }
        }
    }
}

#[test]
fn a_later_key_that_is_not_a_number_leaves_earlier_rows_alone() {
    let heads = heads(4, 2, 32);
    let mut paged = Paged::new(heads, &[40], 2);
    let clean = paged.attend(&Plain, &[(0, 0..40)], None);
    let cols = heads.qkv_cols();
    paged.qkv[0][38 * cols + heads.q * heads.dim..39 * cols].fill(f32::NAN);
    let out_cols = heads.q * heads.dim;
    for (name, device) in devices() {
        let got = paged.attend(&device, &[(0, 0..40)], None);
        assert_close(&name, &got[..38 * out_cols], &clean[..38 * out_cols], 5e-6);
        assert!(got[38 * out_cols..].iter().all(|x| x.is_nan()), "{name}");
    }
}

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

/// The message of the shape error that `outcome` must be.
#[track_caller]
fn refused(outcome: Result<(), KernelError>) -> String {
    match outcome {
        Err(KernelError::Shape(error)) => error.to_string(),
        other => panic!("expected a shape error, got {other:?}"),
    }
}

fn wrong_plans_are_errors_on<B: Backend>(d: &B) {
    let heads = heads(2, 1, 16);
    let cols = heads.qkv_cols();
    let paged = Paged::new(heads, &[20], 1);
    let rows = [(0, 18..20)];
    let mut kv = paged.cache(d, &[20]);
    let qkv = paged.rows(d, &rows);
    let mut out = Tensor::zeros(d, 2, 32).unwrap();
    let batch = || paged.batch(d, &rows);

    let cos_sin = no_turn(d, heads.dim);
    let rotation = Rotation { norm: None, cos_sin: &cos_sin, heads };
    let mut rotate =
        |batch| d.rotate_and_store(&mut kv, &mut paged.rows(d, &rows), &rotation, &batch);
    let bad = Batch { slots: ints(d, &[0, 16 * paged.blocks as i32]), ..batch() };
    assert_eq!(refused(rotate(bad)), "rotate_and_store: slot 80 is outside 0..80");
    refused(rotate(Batch { slots: ints(d, &[-1, 0]), ..batch() }));
    refused(rotate(Batch { slots: ints(d, &[1]), ..batch() }));
    let bad = Batch { rope_rows: ints(d, &[0, 1]), ..batch() };
    assert_eq!(refused(rotate(bad)), "rotate_and_store: table row 1 is outside 0..1");

    let mut attend = |batch: Batch<B>| d.attention(&mut out, &qkv, &kv, &batch, heads, None);
    attend(batch()).unwrap();
    refused(attend(Batch { context_lens: ints(d, &[1]), ..batch() }));
    refused(attend(Batch { context_lens: ints(d, &[400]), ..batch() }));
    refused(attend(Batch { context_lens: ints(d, &[-1]), ..batch() }));
    refused(attend(Batch { row_starts: ints(d, &[0, 1]), ..batch() }));
    refused(attend(Batch { row_starts: ints(d, &[2, 2]), ..batch() }));
    refused(attend(Batch { row_starts: ints(d, &[0, 9]), ..batch() }));
    refused(attend(Batch { positions: ints(d, &[18, 18]), ..batch() }));
    refused(attend(Batch { block_tables: ints(d, &[0, 5, 0]), ..batch() }));
    refused(attend(Batch { block_tables: ints(d, &[0]), ..batch() }));
    refused(d.attention(&mut out, &qkv, &kv, &batch(), heads, Some(0)));
    let other = Heads { kv: 2, q: 4, dim: 8 };
    refused(d.attention(&mut out, &qkv, &kv, &batch(), other, None));
    refused(d.kv(1, Heads { q: 3, kv: 2, dim: 8 }).map(|_| ()));
    refused(d.kv(1, Heads { q: 2, kv: 2, dim: 7 }).map(|_| ()));

    let mut x = Tensor::from_host(d, cols, &vec![0.0; 2 * cols]).unwrap();
    let bad = Batch { logit_rows: ints(d, &[0, 2]), logit_rows_len: 2, ..batch() };
    let mut picked = Tensor::zeros(d, 2, cols).unwrap();
    refused(d.gather_rows(&mut picked, &x, &bad, 0, 2));
    refused(d.gather_rows(&mut picked, &x, &bad, 1, 2));
    refused(d.gather_rows(&mut picked, &x, &bad, usize::MAX, 2));
    x.rows = 3;
    let delta = Tensor::zeros(d, 3, cols).unwrap();
    assert!(refused(d.add(&mut x, &delta)).contains("allocation"));
    refused(d.write_floats(&mut d.floats(1).unwrap(), &[0.0; 2]));
    refused(d.read_floats(&mut [0.0; 2], &d.floats(1).unwrap()));
}

#[test]
fn wrong_plans_are_errors() {
    wrong_plans_are_errors_on(&Plain);
    let (threads, isa) = (2, Isa::detect());
    for precision in [Precision::Fast, Precision::Exact] {
        wrong_plans_are_errors_on(&Cpu::new(CpuConfig { threads, precision, isa }).unwrap());
    }
    let none = Cpu::new(CpuConfig { threads: 0, precision: Precision::Fast, isa });
    assert!(matches!(none.err(), Some(KernelError::Device(_))));
}

#[test]
fn a_block_takes_the_bytes_it_is_said_to() {
    let (threads, isa) = (1, Isa::detect());
    let heads = heads(2, 2, 64);
    for (precision, bytes) in [(Precision::Fast, 2), (Precision::Exact, 4)] {
        let device = Cpu::new(CpuConfig { threads, precision, isa }).unwrap();
        assert_eq!(device.kv_block_bytes(heads), 2 * 2 * 64 * 16 * bytes);
        assert!(device.kv(usize::MAX / 64, heads).is_err());
    }
}
