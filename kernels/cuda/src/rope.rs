//! Head norms, rotation and the KV cache's layout. Kernels: `rope.cu`.

use super::{Array, Cuda, Driver, Element, Launch, elementwise::bf16_vectors};
use kernels::{BLOCK_TOKENS, Batch, Heads, KernelError, Rotation, Tensor, shape};
use kernels::{ShapeError, shape::ensure};
use serde::{Deserialize, Serialize};

/// How cached keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KvFormat {
    Bf16,
    /// e4m3 with a scale for each token's key and value of each head.
    Fp8,
}

impl KvFormat {
    pub fn element_bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }

    /// Bytes of a token's scale.
    pub fn scale_bytes(self) -> usize {
        match self {
            Self::Bf16 => 0,
            Self::Fp8 => size_of::<f32>(),
        }
    }

    /// Bytes of K and V of one block.
    pub fn block_bytes(self, heads: Heads) -> usize {
        let token = heads.dim * self.element_bytes() + self.scale_bytes();
        2 * BLOCK_TOKENS * heads.kv * token
    }
}

/// K and V of one layer, each [blocks, kv heads, 16, D]; of e4m3 with 16 scales in f32 behind each
/// head's 16 tokens.
pub struct CudaKv<D: Driver> {
    heads: Heads,
    blocks: usize,
    format: KvFormat,
    keys: Array<D>,
    values: Array<D>,
}

impl<D: Driver> CudaKv<D> {
    pub(super) fn zeroed(
        driver: &D,
        format: KvFormat,
        blocks: usize,
        heads: Heads,
    ) -> Result<Self, KernelError> {
        shape::heads("kv", heads)?;
        let bytes = blocks * format.block_bytes(heads) / 2;
        let keys = Array::zeroed(driver, "the KV cache", bytes)?;
        Ok(Self {
            heads,
            blocks,
            format,
            keys,
            values: Array::zeroed(driver, "the KV cache", bytes)?,
        })
    }

    pub fn heads(&self) -> Heads {
        self.heads
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// The stored keys, for tests that look at them or damage them.
    pub fn keys(&self) -> &Array<D> {
        &self.keys
    }

    /// As [`Self::keys`].
    pub fn values(&self) -> &Array<D> {
        &self.values
    }
}

const OP: &str = "rotate_and_store";
/// Threads in a block of the kernel.
const THREADS: u32 = 128;
/// Heads of a lane.
const DEPTH: usize = 2;

/// Addresses of what turning rows takes beside them; 0 where there is none.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Turn {
    pub cos_sin: u64,
    pub q_norm: u64,
    pub k_norm: u64,
    pub rope_rows: u64,
    pub slots: u64,
    pub q_scale: u64,
    pub eps: f32,
    pub unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RopeArgs {
    qkv: u64,
    turn: Turn,
    keys: u64,
    values: u64,
    tokens: u32,
    q_heads: u32,
    kv_heads: u32,
    token_warps: u32,
    fp8: u32,
    unused: u32,
}

impl<D: Driver> Cuda<D> {
    /// What turning rows takes beside them, checked.
    pub(super) fn turn(
        &self,
        kv: &CudaKv<D>,
        qkv: &Tensor<Self>,
        rotation: &Rotation<'_, Self>,
        batch: &Batch<Self>,
    ) -> Result<Turn, KernelError> {
        let Rotation { norm, cos_sin, .. } = *rotation;
        let (rows, blocks) = (batch.rope_rows_end, batch.blocks_end);
        ensure(OP, rows <= cos_sin.rows, || {
            format!("table row {} is outside 0..{}", rows - 1, cos_sin.rows)
        })?;
        ensure(OP, blocks <= kv.blocks, || {
            format!("block {} of a cache of {}", blocks - 1, kv.blocks)
        })?;
        f32s("cos_sin", cos_sin.data.element())?;
        bf16_vectors(OP, &[qkv])?;
        if let Some((q, k, _)) = norm {
            bf16_vectors(OP, &[q, k])?;
        }
        Ok(Turn {
            cos_sin: self.at(cos_sin),
            q_norm: norm.map_or(0, |(q, ..)| self.at(q)),
            k_norm: norm.map_or(0, |(_, k, _)| self.at(k)),
            rope_rows: batch.rope_rows.address(&self.driver),
            slots: batch.slots.address(&self.driver),
            q_scale: self.q_scale(batch)?,
            eps: norm.map_or(0.0, |(.., eps)| eps),
            unused: 0,
        })
    }

    /// Norms where there are weights, rotates, and stores.
    pub(super) fn rotate(
        &self,
        kv: &mut CudaKv<D>,
        qkv: &mut Tensor<Self>,
        rotation: &Rotation<'_, Self>,
        batch: &Batch<Self>,
    ) -> Result<(), KernelError> {
        let Heads { q, kv: kv_heads, dim } = rotation.heads;
        let turn = self.turn(kv, qkv, rotation, batch)?;
        let kernel = match dim {
            64 => "rope_d64",
            128 => "rope_d128",
            _ => return Err(unsupported(dim).into()),
        };
        let together = 32 / (dim / 16) * DEPTH;
        let token_warps = (q + 2 * kv_heads).div_ceil(together);
        let warps = qkv.rows * token_warps;
        ensure(OP, warps <= i32::MAX as usize, || {
            format!("{} rows of {} heads, {} at most", qkv.rows, q + 2 * kv_heads, i32::MAX)
        })?;
        if warps == 0 {
            return Ok(());
        }
        let args = RopeArgs {
            qkv: self.at(qkv),
            turn,
            keys: kv.keys.address(&self.driver),
            values: kv.values.address(&self.driver),
            tokens: qkv.rows as u32,
            q_heads: q as u32,
            kv_heads: kv_heads as u32,
            token_warps: token_warps as u32,
            fp8: u32::from(kv.format == KvFormat::Fp8),
            unused: 0,
        };
        let blocks = warps.div_ceil(THREADS as usize / 32) as u32;
        self.driver.launch(Launch::new(kernel, [blocks, 1, 1], THREADS, &args))
    }

    /// The address of the batch's factors on queries, or 0.
    fn q_scale(&self, batch: &Batch<Self>) -> Result<u64, KernelError> {
        let Some(scale) = &batch.q_scale else { return Ok(0) };
        f32s("q_scale", scale.element())?;
        let (room, tokens) = (scale.len(), batch.tokens);
        ensure(OP, room >= tokens, || {
            format!("q_scale needs {tokens} elements, its buffer has {room}")
        })?;
        Ok(scale.address(&self.driver))
    }
}

fn f32s(name: &str, element: Element) -> Result<(), ShapeError> {
    ensure(OP, element == Element::F32, || format!("{name} is {element:?}, not f32"))
}

fn unsupported(dim: usize) -> ShapeError {
    ShapeError { op: OP, detail: format!("no kernel for head_dim {dim}, only for 64 and 128") }
}
