//! Root-mean-square norms, alone and after a residual sum. Kernels: `norm.cu`.

use super::{Cuda, Driver, elementwise::bf16_vectors, rows::ByRow};
use kernels::{KernelError, Tensor};

const RMS_NORM: [ByRow; 3] = [
    ByRow { kernel: "rms_norm_1024", cols_max: 1024, threads: 128 },
    ByRow { kernel: "rms_norm_8192", cols_max: 8192, threads: 256 },
    ByRow { kernel: "rms_norm_16384", cols_max: 16384, threads: 512 },
];

const ADD_RMS_NORM: [ByRow; 3] = [
    ByRow { kernel: "add_rms_norm_1024", cols_max: 1024, threads: 128 },
    ByRow { kernel: "add_rms_norm_8192", cols_max: 8192, threads: 256 },
    ByRow { kernel: "add_rms_norm_16384", cols_max: 16384, threads: 512 },
];

#[repr(C)]
#[derive(Clone, Copy)]
struct NormArgs {
    out: u64,
    x: u64,
    delta: u64,
    weight: u64,
    rows: u64,
    cols: u32,
    eps: f32,
}

impl<D: Driver> Cuda<D> {
    pub(super) fn norm(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Tensor<Self>,
        eps: f32,
    ) -> Result<(), KernelError> {
        bf16_vectors("rms_norm", &[out, x, weight])?;
        let args = self.norm_args(out, x, weight, eps);
        self.launch_rows("rms_norm", &RMS_NORM, (x.rows, x.cols), &args)
    }

    pub(super) fn add_norm(
        &self,
        out: &mut Tensor<Self>,
        (x, delta): (&mut Tensor<Self>, &Tensor<Self>),
        weight: &Tensor<Self>,
        eps: f32,
    ) -> Result<(), KernelError> {
        bf16_vectors("add_rms_norm", &[out, x, delta, weight])?;
        let args = NormArgs { delta: self.at(delta), ..self.norm_args(out, x, weight, eps) };
        self.launch_rows("add_rms_norm", &ADD_RMS_NORM, (x.rows, x.cols), &args)
    }

    fn norm_args(
        &self,
        out: &Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Tensor<Self>,
        eps: f32,
    ) -> NormArgs {
        NormArgs {
            out: self.at(out),
            x: self.at(x),
            delta: 0,
            weight: self.at(weight),
            rows: x.rows as u64,
            // Longer rows than any kernel holds are refused before they are launched.
            cols: x.cols as u32,
            eps,
        }
    }
}
