//! The CPU backend: f32 activations in host memory, vector instructions chosen at run time.
//!
//! Rows keep their bits whatever the batch, the chunks or the threads. Two precisions: `Exact`
//! keeps f32 throughout; `Fast` keeps K and V in half precision and lets products round
//! activations.

mod attention;
mod experts;
pub mod isa;
mod kv;
pub mod linear;
mod memory;
pub mod pool;
mod rotation;
mod rows;
mod simd;

pub use experts::CpuExperts;
pub use isa::Isa;
pub use kv::CpuKv;
pub use linear::{CpuWeight, Precision};
pub use memory::Aligned;
pub use pool::Pool;

use attention::{Attention, Scratch};
use kernels::{
    Backend, Batch, BatchRoom, ExpertRows, Heads, KernelError, PartShape, Rotation, Routes, Step,
    Tensor, WeightPart, host, shape,
};
use kv::{Blocks, Element, Stored};
use linear::{LinearScratch, Product};
use rows::{Add, RmsNorm, SiluMul};
use serde::{Deserialize, Serialize};
use simd::{Level, dispatch};
use std::{
    convert::Infallible,
    sync::{Mutex, PoisonError},
};

/// How a `Cpu` computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuConfig {
    /// Threads of every op, the caller's among them; at least 1.
    pub threads: usize,
    pub precision: Precision,
    /// At most these instructions; what the machine lacks is not used.
    pub isa: Isa,
}

/// One rank's share of a machine's cores.
pub struct Cpu {
    pool: Pool,
    precision: Precision,
    level: Level,
    linear: Mutex<LinearScratch>,
    /// One expert's rows of x.
    gathered: Mutex<Vec<f32>>,
    /// One for each thread.
    attention: Vec<Mutex<Scratch>>,
}

impl Cpu {
    /// # Errors
    /// No threads asked for, or the system refuses them.
    pub fn new(config: CpuConfig) -> Result<Self, KernelError> {
        if config.threads == 0 {
            return Err(KernelError::Device("0 threads: at least 1 is needed".into()));
        }
        let pool = Pool::new(config.threads)
            .map_err(|e| KernelError::Device(format!("cannot start threads: {e}")))?;
        let scratch = |_| Scratch::new().map(Mutex::new);
        let attention = (0..config.threads).map(scratch).collect::<Result<_, _>>()?;
        let level = Level::new(config.isa);
        let (linear, gathered) = Default::default();
        Ok(Self { pool, precision: config.precision, level, linear, gathered, attention })
    }

    /// The instructions in use.
    pub fn isa(&self) -> Isa {
        self.level.isa()
    }

    pub fn precision(&self) -> Precision {
        self.precision
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    fn attend<E: Element>(
        &self,
        call: &Attention<'_, E>,
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        for scratch in &self.attention {
            scratch.lock().unwrap_or_else(PoisonError::into_inner).fit(call.heads.dim)?;
        }
        call.run(&self.pool, self.level, &self.attention, out);
        Ok(())
    }
}

/// The rows in use of a tensor.
fn used(tensor: &Tensor<Cpu>) -> &[f32] {
    &tensor.data[..tensor.rows * tensor.cols]
}

/// The rows in use of a tensor, to be written.
fn used_mut(tensor: &mut Tensor<Cpu>) -> &mut [f32] {
    &mut tensor.data[..tensor.rows * tensor.cols]
}

impl Backend for Cpu {
    type Floats = Aligned<f32>;
    type Ints = Vec<i32>;
    type Weight = CpuWeight;
    type Experts = CpuExperts;
    type Kv = CpuKv;
    type Cuts = ();
    type Mark = ();
    type Sampling = Infallible;

    fn floats(&self, len: usize) -> Result<Aligned<f32>, KernelError> {
        Aligned::zeroed("activations", len)
    }

    fn ints(&self, len: usize) -> Result<Vec<i32>, KernelError> {
        host::zeroed("indices", len)
    }

    fn write_floats(&self, to: &mut Aligned<f32>, values: &[f32]) -> Result<(), KernelError> {
        Ok(host::write(to, values)?)
    }

    fn write_ints(&self, to: &mut Vec<i32>, values: &[i32]) -> Result<(), KernelError> {
        Ok(host::write(to, values)?)
    }

    fn read_floats(&self, to: &mut [f32], from: &Aligned<f32>) -> Result<(), KernelError> {
        Ok(host::read(to, from)?)
    }

    fn host_floats<'a>(&self, floats: &'a mut Aligned<f32>) -> Option<&'a mut [f32]> {
        Some(floats)
    }

    fn host_view<'a>(&self, floats: &'a Aligned<f32>) -> Option<&'a [f32]> {
        Some(floats)
    }

    fn weight(&self, parts: &[WeightPart<'_>]) -> Result<CpuWeight, KernelError> {
        CpuWeight::pack(parts, self.precision)
    }

    fn experts(&self, count: usize, stack: &[PartShape]) -> Result<CpuExperts, KernelError> {
        let (rows, cols) = PartShape::stacked(stack);
        Ok(CpuExperts::new([count, rows, cols]))
    }

    fn push_expert(
        &self,
        to: &mut CpuExperts,
        parts: &[WeightPart<'_>],
    ) -> Result<(), KernelError> {
        to.push(self.weight(parts)?)
    }

    fn kv(&self, blocks: usize, heads: Heads) -> Result<CpuKv, KernelError> {
        shape::heads("kv", heads)?;
        Ok(CpuKv(match self.precision {
            Precision::Fast => Stored::Half(Blocks::new(blocks, heads)?),
            Precision::Exact => Stored::Full(Blocks::new(blocks, heads)?),
        }))
    }

    fn kv_block_bytes(&self, heads: Heads) -> usize {
        let element = match self.precision {
            Precision::Fast => size_of::<u16>(),
            Precision::Exact => size_of::<f32>(),
        };
        kv::block_elements(heads) * element
    }

    fn cuts(&self, _room: &BatchRoom) -> Result<(), KernelError> {
        Ok(())
    }

    fn lay_out(&self, batch: &mut Batch<Self>, step: &Step) -> Result<(), KernelError> {
        Ok(host::lay_out(batch, step)?)
    }

    fn embed(
        &self,
        out: &mut Tensor<Self>,
        table: &CpuWeight,
        first_id: usize,
        batch: &Batch<Self>,
    ) -> Result<(), KernelError> {
        const COST: usize = 8;
        shape::embed(out, table.cols(), batch)?;
        let ids = host::ids(batch)?;
        let cols = out.cols;
        rows::split(&self.pool, used_mut(out), (cols, COST), &|first, out| {
            for (out, &id) in out.chunks_exact_mut(cols).zip(&ids[first..]) {
                let local = usize::try_from(id).ok().and_then(|id| id.checked_sub(first_id));
                match local.filter(|&local| local < table.rows()) {
                    Some(local) => table.read_row(local, out),
                    None => out.fill(0.0),
                }
            }
        });
        Ok(())
    }

    fn rms_norm(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Tensor<Self>,
        eps: f32,
    ) -> Result<(), KernelError> {
        const COST: usize = 2;
        shape::rms_norm(out, x, weight)?;
        let (cols, x, weight) = (x.cols, used(x), used(weight));
        rows::split(&self.pool, used_mut(out), (cols, COST), &|first, out| {
            let x = &x[first * cols..];
            dispatch(self.level, RmsNorm { out, x, weight, eps });
        });
        Ok(())
    }

    fn linear(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &CpuWeight,
        bias: Option<&Tensor<Self>>,
    ) -> Result<(), KernelError> {
        shape::linear(out, x, (weight.rows(), weight.cols()), bias)?;
        let product = Product { x: used(x), rows: x.rows, weight, bias: bias.map(used) };
        let mut scratch = self.linear.lock().unwrap_or_else(PoisonError::into_inner);
        linear::linear(&self.pool, self.isa(), &mut scratch, used_mut(out), product)
    }

    fn rotate_and_store(
        &self,
        kv: &mut CpuKv,
        qkv: &mut Tensor<Self>,
        rotation: &Rotation<'_, Self>,
        batch: &Batch<Self>,
    ) -> Result<(), KernelError> {
        shape::rotate_and_store(qkv, kv.heads(), rotation, batch)?;
        let table_rows = host::rope_rows(batch, rotation.cos_sin.rows)?;
        let q_scale = host::q_scale(batch)?;
        let slots = host::slots(batch, kv.blocks())?;
        let Rotation { norm, cos_sin, heads } = *rotation;
        if let Some(norm) = norm {
            self.norm_heads(qkv, norm, heads);
        }
        self.rotate(qkv, used(cos_sin), (table_rows, q_scale), heads);
        match &mut kv.0 {
            Stored::Half(blocks) => self.store(blocks, used(qkv), slots, heads),
            Stored::Full(blocks) => self.store(blocks, used(qkv), slots, heads),
        }
        Ok(())
    }

    fn attention(
        &self,
        out: &mut Tensor<Self>,
        qkv: &Tensor<Self>,
        kv: &CpuKv,
        batch: &Batch<Self>,
        heads: Heads,
        window: Option<usize>,
    ) -> Result<(), KernelError> {
        shape::attention(out, qkv, kv.heads(), batch, heads)?;
        shape::window(window)?;
        let sequences = &host::sequences(batch, kv.blocks())?[..];
        let (qkv, out) = (used(qkv), used_mut(out));
        match &kv.0 {
            Stored::Half(kv) => self.attend(&Attention { qkv, kv, sequences, heads, window }, out),
            Stored::Full(kv) => self.attend(&Attention { qkv, kv, sequences, heads, window }, out),
        }
    }

    fn silu_mul(&self, out: &mut Tensor<Self>, x: &Tensor<Self>) -> Result<(), KernelError> {
        const COST: usize = 12;
        shape::silu_mul(out, x)?;
        let (cols, x) = (out.cols, used(x));
        rows::split(&self.pool, used_mut(out), (cols, COST), &|first, out| {
            let x = &x[first * 2 * cols..];
            dispatch(self.level, SiluMul { out, x, cols });
        });
        Ok(())
    }

    fn route(&self, routes: &mut Routes<Self>, logits: &Tensor<Self>) -> Result<(), KernelError> {
        experts::route(routes, logits)
    }

    fn expert_linear(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        rows: ExpertRows,
        experts: &CpuExperts,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError> {
        self.multiply_by_expert(out, x, rows, experts, routes)
    }

    fn combine(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        shared: Option<&Tensor<Self>>,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError> {
        self.combine_experts(out, x, shared, routes)
    }

    fn add(&self, x: &mut Tensor<Self>, delta: &Tensor<Self>) -> Result<(), KernelError> {
        const COST: usize = 1;
        shape::add(x, delta)?;
        let (cols, delta) = (x.cols, used(delta));
        rows::split(&self.pool, used_mut(x), (cols, COST), &|first, x| {
            let delta = &delta[first * cols..][..x.len()];
            dispatch(self.level, Add { x, delta });
        });
        Ok(())
    }

    fn gather_rows(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        batch: &Batch<Self>,
        first: usize,
        len: usize,
    ) -> Result<(), KernelError> {
        shape::gather_rows(out, x, batch, first, len)?;
        let rows = host::logit_rows(batch, first..first + len, x.rows)?;
        let (cols, x) = (x.cols, used(x));
        for (out, &from) in used_mut(out).chunks_exact_mut(cols.max(1)).zip(rows) {
            out.copy_from_slice(&x[from as usize * cols..][..cols]);
        }
        Ok(())
    }

    fn mark(&self) -> Result<(), KernelError> {
        Ok(())
    }

    fn wait(&self, (): ()) -> Result<(), KernelError> {
        Ok(())
    }
}
