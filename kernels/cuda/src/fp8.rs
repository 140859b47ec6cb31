//! Matrices in e4m3 with f32 scales, what products in fp8 take. Kernels: `fp8.cu`.

use super::elementwise::{VECTOR, bf16_vectors, blocks};
use super::{Array, Cuda, Driver, rows::ByRow};
use kernels::{KernelError, Tensor, shape::ensure};

/// What the elements of an [`Fp8`] share a scale with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fp8Scaling {
    /// Their row: its largest value becomes 448, e4m3's largest.
    Row,
    /// All others: an element is code · this, which is positive and finite.
    Tensor(f32),
}

/// A matrix of e4m3 on the device, allocated once for `rows_max`.
pub struct Fp8<D: Driver> {
    rows: usize,
    cols: usize,
    rows_max: usize,
    scaling: Fp8Scaling,
    codes: Array<D>,
    scales: Array<D>,
}

impl<D: Driver> Fp8<D> {
    /// Zeros.
    ///
    /// # Errors
    /// `KernelError::Shape` for a scale that is not positive and finite, and for columns that are
    /// no multiple of 8; `KernelError::Memory` where there is not enough.
    pub fn zeros(
        device: &Cuda<D>,
        (rows_max, cols): (usize, usize),
        scaling: Fp8Scaling,
    ) -> Result<Self, KernelError> {
        ensure("fp8", cols > 0 && cols.is_multiple_of(VECTOR), || {
            format!("{cols} columns are no multiple of {VECTOR}: pad them with zeros")
        })?;
        let driver = device.driver();
        let scales_len = if scaling == Fp8Scaling::Row { rows_max } else { 1 };
        let codes = Array::zeroed(driver, "fp8 activations", rows_max.saturating_mul(cols))?;
        let bytes = scales_len.saturating_mul(size_of::<f32>());
        let scales = Array::zeroed(driver, "fp8 scales", bytes)?;
        if let Fp8Scaling::Tensor(scale) = scaling {
            usable_scale("fp8", scale)?;
            scales.write(driver, &scale.to_le_bytes())?;
        }
        Ok(Self { rows: 0, cols, rows_max, scaling, codes, scales })
    }

    /// Those last quantised.
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn scaling(&self) -> Fp8Scaling {
        self.scaling
    }

    /// [rows, cols], one byte each.
    pub fn codes(&self) -> &Array<D> {
        &self.codes
    }

    /// [rows] f32, or one for all.
    pub fn scales(&self) -> &Array<D> {
        &self.scales
    }

    /// All there is room for, from rows in bf16 at `x`.
    fn scaled_rows(&self, device: &Cuda<D>, x: u64) -> ScaledRows {
        ScaledRows {
            codes: self.codes.address(&device.driver),
            scales: self.scales.address(&device.driver),
            x,
            rows: self.rows_max as u64,
            cols: self.cols as u64,
        }
    }
}

/// A scale that can be divided by: neither zero, nor negative, nor infinite, and so its inverse.
pub(super) fn usable_scale(op: &'static str, scale: f32) -> Result<(), KernelError> {
    let fits = scale > 0.0 && scale.is_finite() && scale.recip().is_finite();
    Ok(ensure(op, fits, || format!("scale {scale} is not positive with a finite inverse"))?)
}

/// The longest row that can have a scale of its own.
pub(super) const SCALED_COLS_MAX: usize = 32768;
const QUANTIZE_ROWS: [ByRow; 3] = [
    ByRow { kernel: "quantize_rows_1024", cols_max: 1024, threads: 128 },
    ByRow { kernel: "quantize_rows_8192", cols_max: 8192, threads: 256 },
    ByRow { kernel: "quantize_rows_32768", cols_max: SCALED_COLS_MAX, threads: 512 },
];

/// Rows in bf16 and in e4m3 with a scale each, by address.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ScaledRows {
    pub codes: u64,
    pub scales: u64,
    pub x: u64,
    pub rows: u64,
    /// A multiple of 8.
    pub cols: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ScaleArgs {
    pub codes: u64,
    pub x: u64,
    pub scales: u64,
    pub vectors: u32,
    pub row_vectors: u32,
}

impl<D: Driver> Cuda<D> {
    /// out [T, K] = x [T, K] / scale, rounded to nearest even, at most ±448; NaN stays NaN. Where
    /// rows have scales of their own they are written too.
    ///
    /// # Errors
    /// `KernelError::Shape` where x does not fit `out`, or has rows of more than 32768 columns that
    /// want scales of their own; the driver's own.
    pub fn quantize_fp8(&self, out: &mut Fp8<D>, x: &Tensor<Self>) -> Result<(), KernelError> {
        const OP: &str = "quantize_fp8";
        bf16_vectors(OP, &[x])?;
        let fits = x.cols == out.cols && x.rows <= out.rows_max && x.rows <= x.rows_max;
        ensure(OP, fits, || {
            format!("x is [{}, {}], out [{}, {}]", x.rows, x.cols, out.rows_max, out.cols)
        })?;
        match out.scaling {
            Fp8Scaling::Row => {
                let rows = ScaledRows { rows: x.rows as u64, ..out.scaled_rows(self, self.at(x)) };
                self.quantize_rows(&rows)?;
            }
            Fp8Scaling::Tensor(_) => {
                let vectors = x.rows * x.cols / VECTOR;
                let args = ScaleArgs {
                    codes: out.codes.address(&self.driver),
                    x: self.at(x),
                    scales: out.scales.address(&self.driver),
                    vectors: vectors as u32,
                    row_vectors: u32::MAX,
                };
                self.launch_vectors("quantize_tensor", blocks(OP, vectors)?, &args)?;
            }
        }
        out.rows = x.rows;
        Ok(())
    }

    /// out [T, K] = code · scale, rounded to bf16: for devices without products in fp8.
    ///
    /// # Errors
    /// `KernelError::Shape` where `out` is not of x's shape; the driver's own.
    pub fn dequantize_fp8(&self, out: &mut Tensor<Self>, x: &Fp8<D>) -> Result<(), KernelError> {
        const OP: &str = "dequantize_fp8";
        bf16_vectors(OP, &[out])?;
        let fits = (out.rows, out.cols) == (x.rows, x.cols) && out.rows <= out.rows_max;
        ensure(OP, fits, || {
            format!("out is [{}, {}], x [{}, {}]", out.rows, out.cols, x.rows, x.cols)
        })?;
        let (codes, scales) = (x.codes.address(&self.driver), x.scales.address(&self.driver));
        let run = match x.scaling {
            Fp8Scaling::Row => x.cols,
            // A scale for all is one for more than there are.
            Fp8Scaling::Tensor(_) => u32::MAX as usize * VECTOR,
        };
        self.dequantize_rows((self.at(out), codes, scales), x.rows * x.cols, run)
    }

    /// out = code · scale, rounded to bf16, by address, of `len` codes of which each `run` have a
    /// scale: multiples of 8.
    pub(super) fn dequantize_rows(
        &self,
        (out, codes, scales): (u64, u64, u64),
        len: usize,
        run: usize,
    ) -> Result<(), KernelError> {
        const OP: &str = "dequantize_fp8";
        let (vectors, row_vectors) = (len / VECTOR, run / VECTOR);
        let args = ScaleArgs {
            codes,
            x: out,
            scales,
            vectors: vectors as u32,
            row_vectors: row_vectors as u32,
        };
        self.launch_vectors("dequantize_bf16", blocks(OP, vectors)?, &args)
    }

    /// Codes and scales of rows.
    pub(super) fn quantize_rows(&self, rows: &ScaledRows) -> Result<(), KernelError> {
        let shape = (rows.rows as usize, rows.cols as usize);
        self.launch_rows("quantize_fp8", &QUANTIZE_ROWS, shape, rows)
    }
}
