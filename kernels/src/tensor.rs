//! Matrices on a device.

use crate::{Backend, KernelError};

/// A matrix on the device, allocated once for `rows_max`; a step sets `rows`.
pub struct Tensor<B: Backend> {
    pub data: B::Floats,
    pub rows: usize,
    pub cols: usize,
    pub rows_max: usize,
}

impl<B: Backend> Tensor<B> {
    /// Zeroed; `rows` starts at `rows_max`.
    pub fn zeros(device: &B, rows_max: usize, cols: usize) -> Result<Self, KernelError> {
        let data = device.floats(rows_max * cols)?;
        Ok(Self { data, rows: rows_max, cols, rows_max })
    }

    /// As [`Self::zeros`], in f32 whatever the device's activations are.
    pub fn exact_zeros(device: &B, rows_max: usize, cols: usize) -> Result<Self, KernelError> {
        let data = device.exact_floats(rows_max * cols)?;
        Ok(Self { data, rows: rows_max, cols, rows_max })
    }

    /// `values` row-major; `rows` follows from their number.
    pub fn from_host(device: &B, cols: usize, values: &[f32]) -> Result<Self, KernelError> {
        Self::zeros(device, values.len() / cols.max(1), cols)?.with(device, values)
    }

    /// As [`Self::from_host`], in f32 whatever the device's activations are.
    pub fn exact_from_host(device: &B, cols: usize, values: &[f32]) -> Result<Self, KernelError> {
        Self::exact_zeros(device, values.len() / cols.max(1), cols)?.with(device, values)
    }

    fn with(mut self, device: &B, values: &[f32]) -> Result<Self, KernelError> {
        device.write_floats(&mut self.data, values)?;
        Ok(self)
    }
}
