//! rotate_and_store: what becomes of the rows, and what lies in the cache.

use crate::flat::{Indices, guarded, no_turn, refused, text, written};
use crate::{BF16, Check, Device, Tolerance, compare, e4m3, noise, rounded};
use cuda::{Array, Cuda, CudaConfig, CudaKv, Driver, KvFormat};
use kernels::{BLOCK_TOKENS, Backend, Heads, KernelError, Rotation, Tensor, plain::Plain};
use std::ops::Range;

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "rotate_and_store", run: rotate_and_store },
        Check { name: "rotate_and_store to e4m3", run: to_fp8 },
        Check { name: "rotate_and_store: a token in other company", run: company },
        Check { name: "rotate_and_store: NaN", run: nan },
        Check { name: "rotate_and_store: what is refused", run: refusals },
    ]
}

const EPS: f32 = 1e-6;
/// Rows of the table of cosines and sines.
const TABLE_ROWS: usize = 40;

/// A step's rows.
#[derive(Clone, Debug)]
struct Case {
    heads: Heads,
    norm: bool,
    q_scale: bool,
    format: KvFormat,
    /// One element of each key is far larger than the others, and values are small.
    outliers: bool,
    /// Tells rows apart; also the row's number in the table, its slot and its scale.
    tokens: Vec<usize>,
}

/// What a step leaves: packed rows, keys and values as the cache's bytes.
struct Left {
    qkv: Vec<f32>,
    keys: Vec<u8>,
    values: Vec<u8>,
}

impl Case {
    fn new((q, kv, dim): (usize, usize, usize), tokens: &[usize]) -> Self {
        Self {
            heads: Heads { q, kv, dim },
            norm: false,
            q_scale: false,
            format: KvFormat::Bf16,
            outliers: false,
            tokens: tokens.to_vec(),
        }
    }

    fn cols(&self) -> usize {
        self.heads.qkv_cols()
    }

    /// [T, (q + 2 kv) D]
    fn qkv(&self) -> Vec<f32> {
        let Heads { q, kv, dim } = self.heads;
        let row = |&token: &usize| {
            let mut row = rounded(&noise(token as u64 + 10, self.cols()));
            if self.outliers {
                let (keys, values) = row[q * dim..].split_at_mut(kv * dim);
                keys.iter_mut().step_by(dim).for_each(|v| *v *= 512.0);
                values.iter_mut().for_each(|v| *v /= 1024.0);
            }
            row
        };
        self.tokens.iter().flat_map(row).collect()
    }

    /// Weights of the queries' norm and of the keys'.
    fn norms(&self) -> [Vec<f32>; 2] {
        [21, 22].map(|seed| {
            let weight: Vec<f32> = noise(seed, self.heads.dim).iter().map(|w| w + 0.5).collect();
            rounded(&weight)
        })
    }

    /// Every row another rotation, scaled as YaRN does.
    fn cos_sin(&self) -> Vec<f32> {
        let half = self.heads.dim / 2;
        let angles = noise(23, TABLE_ROWS * half);
        let row = |angles: &[f32]| {
            let angles = angles.iter().map(|a| a * std::f32::consts::PI);
            let cos = angles.clone().map(|a| a.cos() * 1.1386);
            cos.chain(angles.map(|a| a.sin() * 1.1386)).collect::<Vec<f32>>()
        };
        angles.chunks_exact(half).flat_map(row).collect()
    }

    fn slot(token: usize) -> usize {
        token * 7 % (4 * BLOCK_TOKENS)
    }

    /// The bytes of a token's key or value head in a cache of `format`, and those of its scale.
    fn place(&self, token: usize, head: usize, format: KvFormat) -> [Range<usize>; 2] {
        let (slot, Heads { kv, dim, .. }) = (Self::slot(token), self.heads);
        let (row, scale) = (dim * format.element_bytes(), format.scale_bytes());
        let start = (slot / BLOCK_TOKENS * kv + head) * BLOCK_TOKENS * (row + scale);
        let (at, behind) = (slot % BLOCK_TOKENS, start + BLOCK_TOKENS * row);
        let bytes = |start: usize, at: usize, len: usize| start + at * len..start + (at + 1) * len;
        [bytes(start, at, row), bytes(behind, at, scale)]
    }

    fn indices(&self) -> Indices {
        let scale = |&token: &usize| 1.0 + token as f32 / 16.0;
        Indices {
            tokens: self.tokens.len(),
            rope_rows: self.tokens.iter().map(|t| (t * 3 % TABLE_ROWS) as i32).collect(),
            slots: self.tokens.iter().map(|t| Self::slot(*t) as i32).collect(),
            q_scale: self.q_scale.then(|| self.tokens.iter().map(scale).collect()),
            ..Indices::default()
        }
    }

    /// The rows, and what the case says should happen to them.
    fn rotate<B: Backend>(&self, device: &B, kv: &mut B::Kv) -> Result<Tensor<B>, KernelError> {
        let dim = self.heads.dim;
        let mut qkv = guarded(device, self.cols(), &self.qkv())?;
        let [q, k] = self.norms();
        let (q, k) = (Tensor::from_host(device, dim, &q)?, Tensor::from_host(device, dim, &k)?);
        let cos_sin = Tensor::exact_from_host(device, dim, &self.cos_sin())?;
        let norm = self.norm.then_some((&q, &k, EPS));
        let rotation = Rotation { norm, cos_sin: &cos_sin, heads: self.heads };
        device.rotate_and_store(kv, &mut qkv, &rotation, &self.indices().batch(device)?)?;
        Ok(qkv)
    }

    /// A cache of bytes that are all ones: NaN in both formats.
    fn cache<D: Driver>(&self, device: &Cuda<D>) -> Result<CudaKv<D>, KernelError> {
        let kv = device.kv(4, self.heads)?;
        for pool in [kv.keys(), kv.values()] {
            pool.write(device.driver(), &vec![0xff; pool.bytes()])?;
        }
        Ok(kv)
    }

    fn device<D: Driver>(&self, device: Device<'_, D>) -> Cuda<D> {
        device(CudaConfig { kv_format: self.format, ..BF16 })
    }

    fn run<D: Driver>(&self, device: Device<'_, D>) -> Result<Left, String> {
        let there = self.device(device);
        let mut kv = self.cache(&there).map_err(text)?;
        let qkv = self.rotate(&there, &mut kv).map_err(text)?;
        let mut left = left(&there, written(&there, &qkv)?, &kv)?;
        if self.format == KvFormat::Bf16 {
            self.take_keys(&mut left.qkv, &left.keys);
        } else {
            let narrow = Self { format: KvFormat::Bf16, ..self.clone() }.run(device)?;
            self.take_keys(&mut left.qkv, &narrow.keys);
        }
        Ok(left)
    }

    /// The key heads of rows, which only the cache holds: one in bf16 as they were rounded.
    fn take_keys(&self, qkv: &mut [f32], cached: &[u8]) {
        let Heads { q, kv, dim } = self.heads;
        for (row, &token) in qkv.chunks_exact_mut(self.cols()).zip(&self.tokens) {
            for (head, key) in row[q * dim..][..kv * dim].chunks_exact_mut(dim).enumerate() {
                let [place, _] = self.place(token, head, KvFormat::Bf16);
                let values = cached[place].as_chunks::<2>().0;
                let widened = values.iter().map(|v| half::bf16::from_le_bytes(*v).to_f32());
                key.iter_mut().zip(widened).for_each(|(key, value)| *key = value);
            }
        }
    }

    /// Rows as the oracle has them.
    fn oracle(&self) -> Result<Vec<f32>, String> {
        let mut kv = Plain.kv(4, self.heads).map_err(text)?;
        let qkv = self.rotate(&Plain, &mut kv).map_err(text)?;
        written(&Plain, &qkv)
    }

    /// Runs the case; compares rows and keys with the oracle's, and the cache with these.
    fn agree<D: Driver>(&self, device: Device<'_, D>) -> Result<(), String> {
        let got = self.run(device).map_err(|error| format!("{self:?}: {error}"))?;
        compare(&format!("{self:?}"), &got.qkv, &self.oracle()?, NEAR)?;
        self.cached(&got).map_err(|error| format!("{self:?}: {error}"))
    }

    /// `Ok` where the cache holds what the rows say, and nothing else was written.
    fn cached(&self, got: &Left) -> Result<(), String> {
        let Heads { q, kv, dim } = self.heads;
        for (pool, first_head) in [(&got.keys, q), (&got.values, q + kv)] {
            let mut owned = vec![false; pool.len()];
            for (row, &token) in got.qkv.chunks_exact(self.cols()).zip(&self.tokens) {
                for head in 0..kv {
                    let [stored, scale] = self.place(token, head, self.format);
                    owned[stored.clone()].fill(true);
                    owned[scale.clone()].fill(true);
                    let wanted = &row[(first_head + head) * dim..][..dim];
                    self.holds((&pool[stored], &pool[scale]), wanted)
                        .map_err(|error| format!("token {token}, head {head}: {error}"))?;
                }
            }
            if owned.iter().zip(pool).any(|(owned, byte)| !owned && *byte != 0xff) {
                return Err("a slot that is no token's was written".into());
            }
        }
        Ok(())
    }

    fn holds(&self, (stored, scale): (&[u8], &[u8]), wanted: &[f32]) -> Result<(), String> {
        match self.format {
            KvFormat::Bf16 => {
                let value = |b: &[u8; 2]| half::bf16::from_le_bytes(*b).to_f32();
                let values: Vec<f32> = stored.as_chunks::<2>().0.iter().map(value).collect();
                compare("the cache", &values, wanted, Tolerance::Rounded)
            }
            KvFormat::Fp8 => {
                // The largest element becomes the largest code; zeros have a scale of 1.
                let most = wanted.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                let (by, factor) = match most > 0.0 {
                    true => (most * (1.0 / e4m3::MAX), e4m3::MAX / most),
                    false => (1.0, 1.0),
                };
                if scale != by.to_le_bytes() {
                    return Err(format!("a scale of {scale:?}, wanted {by}"));
                }
                let scaled: Vec<f32> = wanted.iter().map(|v| v * factor).collect();
                e4m3::compare("the cache", stored, &scaled)
            }
        }
    }
}

/// A difference of two products that nearly cancel is as exact as f32 has them, not as itself.
const NEAR: Tolerance = Tolerance::UlpsOr(1, 2e-6);

fn left<D: Driver>(device: &Cuda<D>, qkv: Vec<f32>, kv: &CudaKv<D>) -> Result<Left, String> {
    let bytes = |pool: &Array<D>| {
        let mut bytes = vec![0; pool.bytes()];
        pool.read(device.driver(), &mut bytes).map(|()| bytes).map_err(text)
    };
    let (keys, values) = (bytes(kv.keys())?, bytes(kv.values())?);
    Ok(Left { qkv, keys, values })
}

/// Head counts of whole models and of their shards: few heads, heads that fill a warp in part, and
/// more than one warp of them.
const HEADS: [(usize, usize, usize); 7] =
    [(1, 1, 64), (14, 2, 64), (9, 3, 64), (1, 1, 128), (5, 5, 128), (16, 2, 128), (7, 1, 128)];

fn rotate_and_store<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for (at, heads) in HEADS.into_iter().enumerate() {
        for tokens in [&[3][..], &[9, 0, 4], &[]] {
            let mut case = Case::new(heads, tokens);
            (case.norm, case.q_scale) = (at % 2 == 0, at % 3 == 0);
            case.agree(device)?;
        }
    }
    let mut case = Case::new((2, 2, 128), &(0..33).collect::<Vec<_>>());
    case.agree(device)?;
    (case.norm, case.q_scale) = (true, true);
    case.agree(device)
}

fn to_fp8<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for (at, heads) in HEADS.into_iter().enumerate() {
        let mut case = Case::new(heads, &[1, 22, 8]);
        case.format = KvFormat::Fp8;
        case.norm = at % 2 == 1;
        case.agree(device)?;
        case.outliers = true;
        case.agree(device)?;
    }
    Ok(())
}

/// Bit for bit: a row does not depend on those beside it.
fn company<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for heads in [(9, 3, 64), (7, 1, 128)] {
        let mut case = Case::new(heads, &[4, 19, 33, 7, 12]);
        (case.norm, case.q_scale) = (true, true);
        let together = case.run(device)?;
        for (token, row) in case.tokens.iter().zip(together.qkv.chunks_exact(case.cols())) {
            let got = Case { tokens: vec![*token], ..case.clone() }.run(device)?;
            if row.iter().zip(&got.qkv).any(|(a, b)| a.to_bits() != b.to_bits()) {
                return Err(format!("{case:?}: token {token} differs alone"));
            }
        }
    }
    Ok(())
}

/// A NaN in a head stays in the pair that is turned with it, and goes to the cache.
fn nan<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for format in [KvFormat::Bf16, KvFormat::Fp8] {
        let mut case = Case::new((4, 2, 64), &[1]);
        case.format = format;
        let Heads { q, dim, .. } = case.heads;
        let there = case.device(device);
        let mut values = case.qkv();
        let at = (q + 1) * dim + 3;
        values[at] = f32::NAN;
        let mut kv = case.cache(&there).map_err(text)?;
        // Nothing behind the row: a read there is an address fault.
        let mut qkv = Tensor::from_host(&there, case.cols(), &values).map_err(text)?;
        let indices = Indices { rope_rows: vec![0], ..case.indices() };
        let batch = indices.batch(&there).map_err(text)?;
        let cos_sin = no_turn(&there, dim).map_err(text)?;
        let rotation = Rotation { norm: None, cos_sin: &cos_sin, heads: case.heads };
        there.rotate_and_store(&mut kv, &mut qkv, &rotation, &batch).map_err(text)?;
        values[at + dim / 2] = f32::NAN;
        case.cached(&left(&there, values, &kv)?)?;
    }
    Ok(())
}

fn refusals<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let run = |case: &Case, change: &dyn Fn(&mut Indices)| {
        let there = case.device(device);
        let mut indices = case.indices();
        change(&mut indices);
        let dim = case.heads.dim;
        let cos_sin = Tensor::exact_from_host(&there, dim, &case.cos_sin())?;
        let mut qkv = guarded(&there, case.cols(), &case.qkv())?;
        let mut kv = case.cache(&there)?;
        let rotation = Rotation { norm: None, cos_sin: &cos_sin, heads: case.heads };
        there.rotate_and_store(&mut kv, &mut qkv, &rotation, &indices.batch(&there)?)
    };
    let case = Case::new((2, 1, 64), &[0, 1]);
    refused("a slot", run(&case, &|i| i.slots[1] = 64), "block 4 of a cache of 4")?;
    refused("a row", run(&case, &|i| i.rope_rows[1] = 40), "table row 40 is outside 0..40")?;
    refused("few scales", run(&case, &|i| i.q_scale = Some(vec![1.0])), "q_scale needs 2")?;
    refused("head_dim 32", run(&Case::new((2, 1, 32), &[0]), &|_| ()), "only for 64 and 128")?;
    Ok(())
}
