//! The ops of [`Backend`] on a [`Driver`].

use super::{
    Array, CudaConfig, CudaExperts, CudaKv, Driver, Element, Floats, Ints, Launch, SampleRoom,
    attention,
    graphs::{self, Graphs},
    linear,
    step::Cuts,
};
use kernels::{
    Backend, Batch, BatchRoom, ExpertRows, Heads, Join, KernelError, PartShape, Rotation, Routes,
    Step, Tensor, WeightPart,
    sampling::{Refused, SampleRequest, Sampled},
    shape,
};
use std::sync::{Mutex, PoisonError};

/// One CUDA device, real or emulated.
pub struct Cuda<D: Driver> {
    pub(super) driver: D,
    pub(super) config: CudaConfig,
    /// What split attention and others leave for a second kernel; grows to the largest need seen.
    workspace: Mutex<Option<Array<D>>>,
    pub(super) graphs: Graphs<D>,
    /// Read behind a step's work, to know that it is done.
    pub(super) end: Mutex<Option<Array<D>>>,
}

/// Rows of logits at once: a step of as many sequences waits for its tokens once.
pub const LOGIT_ROWS_MAX: usize = 256;

impl<D: Driver> Cuda<D> {
    pub fn new(driver: D, config: CudaConfig) -> Self {
        Self {
            driver,
            config,
            workspace: Mutex::new(None),
            graphs: Graphs::new(),
            end: Mutex::new(None),
        }
    }

    pub fn driver(&self) -> &D {
        &self.driver
    }

    /// Changes [`CudaConfig::overlap`] for the launches from now on: for benches, which compare.
    pub fn set_overlap(&mut self, overlap: bool) {
        self.config.overlap = overlap;
    }

    /// The address of at least `bytes` that the kernels of one op may use; the next op overwrites
    /// them.
    pub(super) fn workspace(&self, bytes: usize) -> Result<u64, KernelError> {
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let large_enough = workspace.take().filter(|array| array.bytes() >= bytes);
        let array = match large_enough {
            Some(array) => array,
            // To the next power of two, so that few steps come here.
            None => {
                self.graphs.forget();
                Array::zeroed(&self.driver, "the workspace", bytes.next_power_of_two())?
            }
        };
        let address = array.address(&self.driver);
        *workspace = Some(array);
        Ok(address)
    }

    /// Launches a kernel that waits by itself for those before it.
    pub(super) fn launch_dependent(&self, launch: Launch<'_>) -> Result<(), KernelError> {
        let overlaps = self.config.overlap && self.driver.facts().compute_capability == (9, 0);
        self.driver.launch(launch.dependent(overlaps))
    }

    /// The address of a tensor's first element.
    pub(super) fn at(&self, tensor: &Tensor<Self>) -> u64 {
        tensor.data.address(&self.driver)
    }
}

impl<D: Driver> Backend for Cuda<D> {
    type Floats = Floats<D>;
    type Ints = Ints<D>;
    type Weight = linear::Weight<D>;
    type Experts = CudaExperts<D>;
    type Kv = CudaKv<D>;
    type Cuts = Cuts<D>;
    type Mark = D::Reading;
    type Sampling = SampleRoom<D>;

    /// Ranks have a link of their own between cards, by which sums are twice as few bytes and
    /// exchanges. Each rank's part is rounded to bf16.
    fn join(&self) -> Join {
        Join::Sum
    }

    fn floats(&self, len: usize) -> Result<Floats<D>, KernelError> {
        Floats::zeroed(&self.driver, len, Element::Bf16)
    }

    fn exact_floats(&self, len: usize) -> Result<Floats<D>, KernelError> {
        Floats::zeroed(&self.driver, len, Element::F32)
    }

    fn ints(&self, len: usize) -> Result<Ints<D>, KernelError> {
        Ints::zeroed(&self.driver, len)
    }

    fn write_floats(&self, to: &mut Floats<D>, values: &[f32]) -> Result<(), KernelError> {
        to.write(&self.driver, values)
    }

    fn write_ints(&self, to: &mut Ints<D>, values: &[i32]) -> Result<(), KernelError> {
        to.write(&self.driver, values)
    }

    fn read_floats(&self, to: &mut [f32], from: &Floats<D>) -> Result<(), KernelError> {
        from.read(&self.driver, to)
    }

    fn weight(&self, parts: &[WeightPart<'_>]) -> Result<linear::Weight<D>, KernelError> {
        linear::Weight::upload(self, parts, self.config.weights)
    }

    fn table(&self, parts: &[WeightPart<'_>]) -> Result<linear::Weight<D>, KernelError> {
        linear::Weight::upload_table(self, parts)
    }

    fn gate_up(&self, parts: &[WeightPart<'_>]) -> Result<linear::Weight<D>, KernelError> {
        linear::Weight::upload_gate_up(self, parts, self.config.weights)
    }

    fn experts(&self, count: usize, stack: &[PartShape]) -> Result<CudaExperts<D>, KernelError> {
        CudaExperts::room(self, count, stack, false)
    }

    fn expert_gate_ups(
        &self,
        count: usize,
        stack: &[PartShape],
    ) -> Result<CudaExperts<D>, KernelError> {
        CudaExperts::room(self, count, stack, true)
    }

    fn push_expert(
        &self,
        to: &mut CudaExperts<D>,
        parts: &[WeightPart<'_>],
    ) -> Result<(), KernelError> {
        to.push(self, parts)
    }

    fn kv(&self, blocks: usize, heads: Heads) -> Result<CudaKv<D>, KernelError> {
        CudaKv::zeroed(&self.driver, self.config.kv_format, blocks, heads)
    }

    fn kv_block_bytes(&self, heads: Heads) -> usize {
        self.config.kv_format.block_bytes(heads)
    }

    fn cuts(&self, room: &BatchRoom) -> Result<Cuts<D>, KernelError> {
        Cuts::room(self, room)
    }

    fn lay_out(&self, batch: &mut Batch<Self>, step: &Step) -> Result<(), KernelError> {
        self.begin_step(batch, step)
    }

    fn embed(
        &self,
        out: &mut Tensor<Self>,
        table: &linear::Weight<D>,
        first_id: usize,
        batch: &Batch<Self>,
    ) -> Result<(), KernelError> {
        shape::embed(out, table.cols(), batch)?;
        self.embed_rows(out, table, first_id, batch)
    }

    fn rms_norm(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Tensor<Self>,
        eps: f32,
    ) -> Result<(), KernelError> {
        shape::rms_norm(out, x, weight)?;
        self.norm(out, x, weight, eps)
    }

    fn linear(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &linear::Weight<D>,
        bias: Option<&Tensor<Self>>,
    ) -> Result<(), KernelError> {
        shape::linear(out, x, (weight.rows(), weight.cols()), bias)?;
        self.product(out, x, weight, bias)
    }

    fn rotate_and_store(
        &self,
        kv: &mut CudaKv<D>,
        qkv: &mut Tensor<Self>,
        rotation: &Rotation<'_, Self>,
        batch: &Batch<Self>,
    ) -> Result<(), KernelError> {
        shape::rotate_and_store(qkv, kv.heads(), rotation, batch)?;
        self.rotate(kv, qkv, rotation, batch)
    }

    fn attention(
        &self,
        out: &mut Tensor<Self>,
        qkv: &Tensor<Self>,
        kv: &CudaKv<D>,
        batch: &Batch<Self>,
        heads: Heads,
        window: Option<usize>,
    ) -> Result<(), KernelError> {
        shape::attention(out, qkv, kv.heads(), batch, heads)?;
        shape::window(window)?;
        self.attend(out, &attention::Call { qkv, kv, batch, heads, window, turn: None })
    }

    fn rotate_and_attend(
        &self,
        out: &mut Tensor<Self>,
        kv: &mut CudaKv<D>,
        qkv: &mut Tensor<Self>,
        rotation: &Rotation<'_, Self>,
        batch: &Batch<Self>,
        window: Option<usize>,
    ) -> Result<(), KernelError> {
        if !batch.cuts.fused {
            self.rotate_and_store(kv, qkv, rotation, batch)?;
            return self.attention(out, qkv, kv, batch, rotation.heads, window);
        }
        let heads = rotation.heads;
        shape::rotate_and_store(qkv, kv.heads(), rotation, batch)?;
        shape::attention(out, qkv, kv.heads(), batch, heads)?;
        shape::window(window)?;
        let turn = Some(self.turn(kv, qkv, rotation, batch)?);
        self.attend(out, &attention::Call { qkv, kv, batch, heads, window, turn })
    }

    fn silu_mul(&self, out: &mut Tensor<Self>, x: &Tensor<Self>) -> Result<(), KernelError> {
        shape::silu_mul(out, x)?;
        self.gate(out, x)
    }

    fn gated(
        &self,
        out: &mut Tensor<Self>,
        room: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &linear::Weight<D>,
    ) -> Result<(), KernelError> {
        shape::linear(room, x, (weight.rows(), weight.cols()), None)?;
        shape::silu_mul(out, room)?;
        self.gated_product(out, room, x, weight)
    }

    fn route(&self, routes: &mut Routes<Self>, logits: &Tensor<Self>) -> Result<(), KernelError> {
        self.choose_experts(routes, logits)
    }

    fn expert_linear(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        rows: ExpertRows,
        experts: &CudaExperts<D>,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError> {
        self.expert_product(out, x, rows, experts, routes)
    }

    fn expert_gated(
        &self,
        out: &mut Tensor<Self>,
        room: &mut Tensor<Self>,
        x: &Tensor<Self>,
        experts: &CudaExperts<D>,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError> {
        shape::silu_mul(out, room)?;
        self.gated_expert_product(out, room, x, experts, routes)
    }

    fn combine(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        shared: Option<&Tensor<Self>>,
        routes: &Routes<Self>,
    ) -> Result<(), KernelError> {
        self.sum_experts(out, x, shared, routes)
    }

    fn add(&self, x: &mut Tensor<Self>, delta: &Tensor<Self>) -> Result<(), KernelError> {
        shape::add(x, delta)?;
        self.add_to(x, delta)
    }

    fn add_rms_norm(
        &self,
        out: &mut Tensor<Self>,
        x: &mut Tensor<Self>,
        delta: &Tensor<Self>,
        weight: &Tensor<Self>,
        eps: f32,
    ) -> Result<(), KernelError> {
        shape::add(x, delta)?;
        shape::rms_norm(out, x, weight)?;
        self.add_norm(out, (x, delta), weight, eps)
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
        self.gather(out, x, batch, first)
    }

    fn graph_rows(&self, rows: usize) -> Option<usize> {
        graphs::rows(rows).filter(|_| self.driver.captures())
    }

    fn captured<E: From<KernelError>>(
        &self,
        batch: &Batch<Self>,
        ops: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        self.run_captured((batch.tokens, batch.cuts.fused), ops)
    }

    fn forget_steps(&self) -> Result<(), KernelError> {
        self.wait(self.mark()?).map(|()| self.graphs.forget())
    }

    fn logit_rows_max(&self) -> usize {
        LOGIT_ROWS_MAX
    }

    fn sampling(
        &self,
        rows_max: usize,
        vocab: usize,
        drawable: usize,
    ) -> Result<Option<SampleRoom<D>>, KernelError> {
        self.sample_room(rows_max, vocab, drawable).map(Some)
    }

    fn ask(
        &self,
        batch: &mut Batch<Self>,
        room: &mut SampleRoom<D>,
        asked: &[(SampleRequest<'_>, Option<usize>)],
    ) -> Result<(), KernelError> {
        self.ask_of_step(batch, room, asked)
    }

    fn sample(
        &self,
        batch: &mut Batch<Self>,
        room: &mut SampleRoom<D>,
        logits: &mut Tensor<Self>,
        first: usize,
    ) -> Result<(), KernelError> {
        self.begin_sampling(room, logits, (first, self.at(&batch.last_ids)))
    }

    fn answers(
        &self,
        room: &mut SampleRoom<D>,
    ) -> Result<Vec<Result<Sampled, Refused>>, KernelError> {
        room.answers(&self.driver)
    }

    fn keeps_sampled(&self) -> bool {
        true
    }

    fn mark(&self) -> Result<D::Reading, KernelError> {
        self.end_of_work()
    }

    fn wait(&self, mark: D::Reading) -> Result<(), KernelError> {
        self.driver.end_read(mark).map(drop)
    }
}
