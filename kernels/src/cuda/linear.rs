//! Weights and the matrix product.

use super::{Array, Cuda, Driver, Element, Floats, Gemm};
use crate::{KernelError, Tensor, WeightPart, plain::dequant, shape::ensure};

/// A weight [N, K] on the device.
pub struct Weight<D: Driver> {
    rows: usize,
    cols: usize,
    /// bf16, row-major.
    values: Array<D>,
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
        Ok(Self { rows, cols, values })
    }

    /// N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    pub(super) fn address(&self, driver: &D) -> u64 {
        self.values.address(driver)
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
        self.driver.gemm(Gemm {
            out: self.at(out),
            out_element: out.data.element(),
            x: self.at(x),
            weight: weight.address(&self.driver),
            bias: bias.map(|bias| self.at(bias)),
            m: x.rows,
            n: weight.rows,
            k: weight.cols,
        })
    }
}
