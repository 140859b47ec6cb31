//! Head norms, rotation and the KV cache's layout. Kernels: `rope.cu`.

use super::{Array, Cuda, Driver};
use crate::{BLOCK_TOKENS, Batch, Heads, KernelError, Rotation, Tensor, shape};

/// How cached keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    Bf16,
    /// e4m3 with one scale for the layer's keys and one for its values.
    Fp8,
}

impl KvFormat {
    pub fn element_bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }

    /// Bytes of K and V of one block.
    pub fn block_bytes(self, heads: Heads) -> usize {
        2 * BLOCK_TOKENS * heads.kv * heads.dim * self.element_bytes()
    }
}

/// K and V of one layer, each [blocks, kv heads, 16, D].
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

impl<D: Driver> Cuda<D> {
    pub(super) fn norm_heads(
        &self,
        _qkv: &mut Tensor<Self>,
        _norm: (&Tensor<Self>, &Tensor<Self>, f32),
        _heads: Heads,
    ) -> Result<(), KernelError> {
        Err(KernelError::Device("no kernel yet".into()))
    }

    /// Norms, rotates and, where there is a cache, stores.
    pub(super) fn rotate(
        &self,
        _kv: Option<&mut CudaKv<D>>,
        _qkv: &mut Tensor<Self>,
        _rotation: &Rotation<'_, Self>,
        _batch: &Batch<Self>,
    ) -> Result<(), KernelError> {
        Err(KernelError::Device("no kernel yet".into()))
    }

    pub(super) fn store(
        &self,
        _kv: &mut CudaKv<D>,
        _qkv: &Tensor<Self>,
        _batch: &Batch<Self>,
    ) -> Result<(), KernelError> {
        Err(KernelError::Device("no kernel yet".into()))
    }
}
