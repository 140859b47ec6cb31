//! Weights and the matrix product.

pub(super) mod upload;

use super::{
    Array, Cuda, Driver, Element, Floats, Fp8, Gemm, Scales,
    fp8::{SCALED_COLS_MAX, ScaledRows},
    int4::{self, Int4},
};
use kernels::{KernelError, PartShape, Tensor, WeightPart, shape::ensure};
use serde::{Deserialize, Serialize};

/// How the matrices of a model's layers are kept on the device, but for those that a checkpoint
/// stores as integers of 4 bits in groups: these stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightFormat {
    Bf16,
    /// e4m3 with a scale for each row (output), found when the weight is uploaded; activations get
    /// one for each token as they come. On devices without such products the weight is widened to
    /// bf16 for each. Matrices whose rows or columns are no multiple of 16 stay bf16.
    Fp8,
}

impl WeightFormat {
    /// Whether a matrix [N, K] is kept in e4m3.
    fn is_fp8(self, rows: usize, cols: usize) -> bool {
        let even = rows.is_multiple_of(16) && cols.is_multiple_of(16);
        self == Self::Fp8 && even && cols <= SCALED_COLS_MAX
    }

    /// Bytes that the device holds of matrices, stacked by rows, that are uploaded as one weight.
    pub fn bytes(self, stack: &[PartShape]) -> u64 {
        int4::bytes(stack).map_or_else(|| self.rounded_bytes(stack), |bytes| bytes as u64)
    }

    /// As [`Self::bytes`], of a table (`Backend::table`).
    pub fn table_bytes(stack: &[PartShape]) -> u64 {
        Self::Bf16.rounded_bytes(stack)
    }

    fn rounded_bytes(self, stack: &[PartShape]) -> u64 {
        let rows: usize = stack.iter().map(|part| part.rows).sum();
        let cols = stack.first().map_or(0, |part| part.cols);
        let row_bytes = match self.is_fp8(rows, cols) {
            true => cols + size_of::<f32>(),
            false => cols * Element::Bf16.bytes(),
        };
        (rows * row_bytes) as u64
    }
}

/// Bytes of the workspace that products of up to `tokens` rows with a stack want.
pub(super) fn workspace_bytes(
    format: WeightFormat,
    stack: &[PartShape],
    tokens: usize,
    fp8_products: bool,
) -> usize {
    if let Some(bytes) = int4::workspace_bytes(stack, tokens) {
        return bytes;
    }
    let rows: usize = stack.iter().map(|part| part.rows).sum();
    let cols = stack.first().map_or(0, |part| part.cols);
    match format.is_fp8(rows, cols) {
        true if fp8_products => {
            tokens.saturating_mul(size_of::<f32>()).saturating_add(codes_bytes(tokens, cols))
        }
        true => rows * cols * Element::Bf16.bytes(),
        false => 0,
    }
}

/// Activations in e4m3, so that their scales can follow.
fn codes_bytes(rows: usize, cols: usize) -> usize {
    rows.saturating_mul(cols).checked_next_multiple_of(256).unwrap_or(usize::MAX)
}

/// A weight [N, K] on the device.
pub struct Weight<D: Driver> {
    rows: usize,
    cols: usize,
    stored: Stored<D>,
}

/// What the device holds.
enum Stored<D: Driver> {
    /// Row-major.
    Bf16(Array<D>),
    /// With a scale for each row.
    Fp8(Fp8<D>),
    Int4(Int4<D>),
}

impl<D: Driver> Weight<D> {
    /// Integers in groups where there are kernels for them, every other stored format rounded to
    /// what `format` says.
    pub(super) fn upload(
        device: &Cuda<D>,
        parts: &[WeightPart<'_>],
        format: WeightFormat,
    ) -> Result<Self, KernelError> {
        let (rows, cols) = WeightPart::check(parts)?;
        match Int4::new(&device.driver, parts)? {
            Some(values) => Ok(Self { rows, cols, stored: Stored::Int4(values) }),
            None => {
                let driver = &device.driver;
                let is_fp8 = format.is_fp8(rows, cols) && driver.facts().fp8_products();
                driver.expect_products((rows, cols), is_fp8)?;
                Self::rounded(device, parts, (rows, cols), format)
            }
        }
    }

    /// Every stored format, rounded to bf16.
    pub(super) fn upload_table(
        device: &Cuda<D>,
        parts: &[WeightPart<'_>],
    ) -> Result<Self, KernelError> {
        let shape = WeightPart::check(parts)?;
        Self::rounded(device, parts, shape, WeightFormat::Bf16)
    }

    /// Parts that were found to be of one shape, rounded to what `format` says.
    fn rounded(
        device: &Cuda<D>,
        parts: &[WeightPart<'_>],
        (rows, cols): (usize, usize),
        format: WeightFormat,
    ) -> Result<Self, KernelError> {
        let stored = if format.is_fp8(rows, cols) {
            Stored::Fp8(upload::fp8(device, parts, (rows, cols))?)
        } else {
            Stored::Bf16(upload::bf16(device, parts, (rows, cols))?)
        };
        Ok(Self { rows, cols, stored })
    }

    /// N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Where the rows [N, K] lie as bf16.
    ///
    /// # Errors
    /// `KernelError::Weight` where they do not.
    pub(super) fn table(&self, driver: &D) -> Result<u64, KernelError> {
        match &self.stored {
            Stored::Bf16(values) => Ok(values.address(driver)),
            Stored::Fp8(_) | Stored::Int4(_) => Err(KernelError::Weight(
                "quantised rows cannot be looked up; upload the matrix as a table".into(),
            )),
        }
    }
}

impl<D: Driver> Cuda<D> {
    pub(super) fn product(
        &self,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Weight<D>,
        bias: Option<&Tensor<Self>>,
    ) -> Result<(), KernelError> {
        let bf16 = |floats: &Floats<D>| floats.element() == Element::Bf16;
        let fits = bf16(&x.data) && bias.is_none_or(|bias| bf16(&bias.data));
        ensure("linear", fits, || "activations and bias are not bf16".into())?;
        // The library adds a bias of the output's own type, and here that is bf16.
        let fits = bias.is_none() || bf16(&out.data);
        ensure("linear", fits, || "no output in f32 takes a bias".into())?;
        if x.rows == 0 {
            return Ok(());
        }
        let gemm = |x: &Tensor<Self>, weight| Gemm {
            out: self.at(out),
            out_element: out.data.element(),
            x: self.at(x),
            weight,
            scales: None,
            bias: bias.map(|bias| self.at(bias)),
            m: x.rows,
            n: out.cols,
            k: x.cols,
        };
        match &weight.stored {
            Stored::Bf16(values) => self.driver.gemm(gemm(x, values.address(&self.driver))),
            Stored::Fp8(values) if self.driver.facts().fp8_products() => {
                self.fp8_product(gemm(x, values.codes().address(&self.driver)), values)
            }
            Stored::Fp8(values) => {
                let widened = self.workspace(weight.rows * weight.cols * Element::Bf16.bytes())?;
                self.dequantize_to(widened, values)?;
                self.driver.gemm(gemm(x, widened))
            }
            Stored::Int4(values) => self.int4_product(out, x, values, bias),
        }
    }

    /// `gemm` with its x in bf16, rounded here to e4m3 with a scale for each row.
    fn fp8_product(&self, gemm: Gemm, weight: &Fp8<D>) -> Result<(), KernelError> {
        let codes_bytes = codes_bytes(gemm.m, gemm.k);
        let codes = self.workspace(codes_bytes + gemm.m * size_of::<f32>())?;
        let scales = codes + codes_bytes as u64;
        let (rows, cols) = (gemm.m as u64, gemm.k as u64);
        self.quantize_rows(&ScaledRows { codes, scales, x: gemm.x, rows, cols })?;
        let weight_scales = weight.scales().address(&self.driver);
        let scales = Some(Scales { x: scales, weight: weight_scales });
        self.driver.gemm(Gemm { x: codes, scales, ..gemm })
    }
}
