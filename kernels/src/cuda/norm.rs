//! Root-mean-square norms, alone and after a residual sum. Kernels: `norm.cu`.

use super::{Cuda, Driver};
use crate::{KernelError, Tensor};

impl<D: Driver> Cuda<D> {
    pub(super) fn norm(
        &self,
        _out: &mut Tensor<Self>,
        _x: &Tensor<Self>,
        _weight: &Tensor<Self>,
        _eps: f32,
    ) -> Result<(), KernelError> {
        Err(KernelError::Device("no kernel yet".into()))
    }

    pub(super) fn add_norm(
        &self,
        _out: &mut Tensor<Self>,
        (_x, _delta): (&mut Tensor<Self>, &Tensor<Self>),
        _weight: &Tensor<Self>,
        _eps: f32,
    ) -> Result<(), KernelError> {
        Err(KernelError::Device("no kernel yet".into()))
    }
}
