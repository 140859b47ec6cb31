//! Ops that move or combine rows: embed, add, silu_mul, gather_rows. Kernels: `elementwise.cu`.

use super::{Cuda, Driver, Launch, linear::Weight};
use crate::{Batch, KernelError, Tensor, shape::ensure};

/// Threads in a block of the element-wise kernels.
const THREADS: u32 = 256;
/// bf16 elements in the 16 bytes that a thread moves at a time.
const VECTOR: usize = 8;

#[repr(C)]
#[derive(Clone, Copy)]
struct AddArgs {
    x: u64,
    delta: u64,
    elements: u64,
}

impl<D: Driver> Cuda<D> {
    pub(super) fn add_to(
        &self,
        x: &mut Tensor<Self>,
        delta: &Tensor<Self>,
    ) -> Result<(), KernelError> {
        let elements = x.rows * x.cols;
        whole_vectors("add", x.cols)?;
        let args = AddArgs { x: self.at(x), delta: self.at(delta), elements: elements as u64 };
        let blocks = (elements / VECTOR).div_ceil(THREADS as usize);
        if blocks == 0 {
            return Ok(());
        }
        self.driver.launch(Launch::new("add_bf16", [blocks as u32, 1, 1], THREADS, &args))
    }
}

/// Rows that threads can move in 16-byte pieces.
fn whole_vectors(op: &'static str, cols: usize) -> Result<(), KernelError> {
    let fits = cols.is_multiple_of(VECTOR);
    Ok(ensure(op, fits, || format!("{cols} columns are no multiple of {VECTOR}"))?)
}

impl<D: Driver> Cuda<D> {
    pub(super) fn embed_rows(
        &self,
        _out: &mut Tensor<Self>,
        _table: &Weight<D>,
        _first_id: usize,
        _batch: &Batch<Self>,
    ) -> Result<(), KernelError> {
        Err(KernelError::Device("no kernel yet".into()))
    }

    pub(super) fn gate(
        &self,
        _out: &mut Tensor<Self>,
        _x: &Tensor<Self>,
    ) -> Result<(), KernelError> {
        Err(KernelError::Device("no kernel yet".into()))
    }

    pub(super) fn gather(
        &self,
        _out: &mut Tensor<Self>,
        _x: &Tensor<Self>,
        _batch: &Batch<Self>,
        _first: usize,
    ) -> Result<(), KernelError> {
        Err(KernelError::Device("no kernel yet".into()))
    }
}
