//! Sequences with several rows. Kernels: `attention_prefill.cu`.

use super::Call;
use crate::{
    KernelError, Tensor,
    cuda::{Cuda, Driver},
};

impl<D: Driver> Cuda<D> {
    pub(super) fn prefill(
        &self,
        _out: &mut Tensor<Self>,
        _call: &Call<'_, D>,
    ) -> Result<(), KernelError> {
        Err(KernelError::Device("no kernel yet".into()))
    }
}
