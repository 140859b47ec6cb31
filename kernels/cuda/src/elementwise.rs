//! Ops that move or combine rows: embed, add, silu_mul, gather_rows. Kernels: `elementwise.cu`.

use super::{Cuda, Driver, Element, Launch, linear::Weight};
use kernels::{Batch, KernelError, Tensor, shape::ensure};

/// Threads in a block of the element-wise kernels.
pub(super) const THREADS: u32 = 256;
/// bf16 elements in the 16 bytes that a thread moves at a time.
pub(super) const VECTOR: usize = 8;
/// Vectors of a thread.
const DEPTH: usize = 2;

#[repr(C)]
#[derive(Clone, Copy)]
struct AddArgs {
    x: u64,
    delta: u64,
    vectors: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SiluMulArgs {
    out: u64,
    x: u64,
    vectors: u32,
    row_vectors: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GatherArgs {
    out: u64,
    table: u64,
    rows: u64,
    first: i64,
    table_rows: u64,
    vectors: u32,
    row_vectors: u32,
}

/// Addresses of a gather, and which rows the table has.
struct Gather {
    table: u64,
    table_rows: usize,
    rows: u64,
    first: i64,
}

/// Blocks for `vectors` vectors, which kernels number in 32 bits.
pub(super) fn blocks(op: &'static str, vectors: usize) -> Result<u32, KernelError> {
    ensure(op, vectors <= i32::MAX as usize, || {
        format!("{vectors} vectors of {VECTOR} elements in one step, {} at most", i32::MAX)
    })?;
    Ok(vectors.div_ceil(THREADS as usize * DEPTH) as u32)
}

/// Tensors that kernels read and write as bf16, rows in 16-byte pieces.
pub(super) fn bf16_vectors<D: Driver>(
    op: &'static str,
    tensors: &[&Tensor<Cuda<D>>],
) -> Result<(), KernelError> {
    for tensor in tensors {
        let (cols, element) = (tensor.cols, tensor.data.element());
        ensure(op, element == Element::Bf16, || format!("a tensor is {element:?}, not bf16"))?;
        ensure(op, cols > 0 && cols.is_multiple_of(VECTOR), || {
            format!("{cols} columns are no multiple of {VECTOR}: pad them with zeros")
        })?;
    }
    Ok(())
}

impl<D: Driver> Cuda<D> {
    pub(super) fn add_to(
        &self,
        x: &mut Tensor<Self>,
        delta: &Tensor<Self>,
    ) -> Result<(), KernelError> {
        bf16_vectors("add", &[x, delta])?;
        let vectors = x.rows * x.cols / VECTOR;
        let args = AddArgs { x: self.at(x), delta: self.at(delta), vectors: vectors as u64 };
        self.launch_vectors("add_bf16", blocks("add", vectors)?, &args)
    }

    pub(super) fn embed_rows(
        &self,
        out: &mut Tensor<Self>,
        table: &Weight<D>,
        first_id: usize,
        batch: &Batch<Self>,
    ) -> Result<(), KernelError> {
        // Any id may come: those outside the table are the other ranks'.
        let first = i64::try_from(first_id).ok();
        ensure("embed", first.is_some(), || format!("first id {first_id} is out of range"))?;
        let from = Gather {
            table: table.table(&self.driver)?,
            table_rows: table.rows(),
            rows: batch.ids.address(&self.driver),
            first: first.unwrap_or_default(),
        };
        self.gather_from("embed", out, &from)
    }

    pub(super) fn gate(&self, out: &mut Tensor<Self>, x: &Tensor<Self>) -> Result<(), KernelError> {
        bf16_vectors("silu_mul", &[out, x])?;
        let row_vectors = out.cols / VECTOR;
        let vectors = out.rows * row_vectors;
        let blocks = blocks("silu_mul", vectors)?;
        let args = SiluMulArgs {
            out: self.at(out),
            x: self.at(x),
            vectors: vectors as u32,
            row_vectors: row_vectors as u32,
        };
        self.launch_vectors("silu_mul_bf16", blocks, &args)
    }

    /// out [len, H] = rows `batch.logit_rows[first..]` of x.
    pub(super) fn gather(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        batch: &Batch<Self>,
        first: usize,
    ) -> Result<(), KernelError> {
        bf16_vectors("gather_rows", &[x])?;
        ensure("gather_rows", x.rows >= batch.tokens, || {
            format!("{} rows of a step of {} tokens", x.rows, batch.tokens)
        })?;
        let rows = batch.logit_rows.address(&self.driver) + (first * size_of::<i32>()) as u64;
        let from = Gather { table: self.at(x), table_rows: x.rows, rows, first: 0 };
        self.gather_from("gather_rows", out, &from)
    }

    fn gather_from(
        &self,
        op: &'static str,
        out: &mut Tensor<Self>,
        from: &Gather,
    ) -> Result<(), KernelError> {
        bf16_vectors(op, &[out])?;
        let row_vectors = out.cols / VECTOR;
        let vectors = out.rows * row_vectors;
        let blocks = blocks(op, vectors)?;
        let args = GatherArgs {
            out: self.at(out),
            table: from.table,
            rows: from.rows,
            first: from.first,
            table_rows: from.table_rows as u64,
            vectors: vectors as u32,
            row_vectors: row_vectors as u32,
        };
        if blocks == 0 {
            return Ok(());
        }
        // Behind the end of all before: a step's first launch is of what dependent launches read
        // without waiting.
        self.driver.launch(Launch::new("gather_bf16", [blocks, 1, 1], THREADS, &args))
    }

    /// Runs a kernel of `THREADS` threads where there is anything to do. It waits for the launches
    /// before.
    pub(super) fn launch_vectors<A: Copy>(
        &self,
        kernel: &'static str,
        blocks: u32,
        args: &A,
    ) -> Result<(), KernelError> {
        if blocks == 0 {
            return Ok(());
        }
        self.launch_dependent(Launch::new(kernel, [blocks, 1, 1], THREADS, args))
    }
}
