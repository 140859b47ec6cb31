//! Weights and the matrix product.

use super::{Array, Cuda, Driver, Element, Floats, Gemm, int4::Int4};
use crate::{KernelError, Tensor, WeightPart, plain::dequant, shape::ensure};

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
    Int4(Int4<D>),
}

impl<D: Driver> Weight<D> {
    /// Every stored format, rounded to bf16.
    pub(super) fn bf16(driver: &D, parts: &[WeightPart<'_>]) -> Result<Self, KernelError> {
        let (rows, cols) = WeightPart::check(parts)?;
        let values = Array::zeroed(driver, "a weight", rows * cols * Element::Bf16.bytes())?;
        let mut at = 0;
        for part in parts {
            let mut stored = vec![0.0; part.stored_cols];
            for n in 0..part.rows {
                dequant::dequantize_row(part.format, part.stored_row(n), &mut stored);
                let row = stored[part.cols.clone()].iter();
                let bytes: Vec<u8> =
                    row.flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
                driver.write(&values.memory, at, &bytes)?;
                at += bytes.len();
            }
        }
        Ok(Self { rows, cols, stored: Stored::Bf16(values) })
    }

    /// N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    pub(super) fn int4(values: Int4<D>) -> Self {
        let (rows, cols) = values.shape();
        Self { rows, cols, stored: Stored::Int4(values) }
    }

    /// Where the rows [N, K] lie as bf16.
    ///
    /// # Errors
    /// `KernelError::Weight` where they do not.
    pub(super) fn address(&self, driver: &D) -> Result<u64, KernelError> {
        match &self.stored {
            Stored::Bf16(values) => Ok(values.address(driver)),
            Stored::Int4(_) => Err(KernelError::Weight(
                "int4 rows cannot be looked up; store the table in bf16".into(),
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
        if x.rows == 0 {
            return Ok(());
        }
        if let Stored::Int4(values) = &weight.stored {
            return self.int4_product(out, x, values, bias);
        }
        self.driver.gemm(Gemm {
            out: self.at(out),
            out_element: out.data.element(),
            x: self.at(x),
            weight: weight.address(&self.driver)?,
            bias: bias.map(|bias| self.at(bias)),
            m: x.rows,
            n: weight.rows,
            k: weight.cols,
        })
    }
}
