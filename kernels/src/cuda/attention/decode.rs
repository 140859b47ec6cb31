//! Sequences with one row. Kernels: `attention_decode.cu`.

use super::Call;
use crate::{
    KernelError, Tensor,
    cuda::{Cuda, Driver},
};

impl<D: Driver> Cuda<D> {
    pub(super) fn decode(
        &self,
        _out: &mut Tensor<Self>,
        _call: &Call<'_, D>,
    ) -> Result<(), KernelError> {
        Err(KernelError::Device("no kernel yet".into()))
    }
}
