//! Weights and the matrix product.

mod route;
pub(super) mod upload;

use super::{
    Array, Cuda, Driver, Element, Floats, Gemm, Scales,
    elementwise::{VECTOR, bf16_vectors},
    fp8::{SCALED_COLS_MAX, ScaledRows},
    int4::{self, Int4},
    skinny::{self, Extent, Inputs, Numbers, Records},
};
use kernels::{KernelError, PartShape, Tensor, WeightPart, shape::ensure};
pub use route::RECORDS_ROWS_MAX;
use route::{Route, aligned, in_records, product_bytes, route};
use serde::{Deserialize, Serialize};

/// How the matrices of a model's layers are kept on the device, but for those that a checkpoint
/// stores as integers of 4 bits in groups: these stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightFormat {
    Bf16,
    /// e4m3 with a scale for each row (output), found when the weight is uploaded. Few tokens are
    /// multiplied in bf16; many get a scale each and are rounded to e4m3, but for devices without
    /// such products, where the weight becomes bf16. An expert's are multiplied in bf16 always.
    /// Matrices whose rows or columns are no multiple of 16 stay bf16.
    Fp8,
}

impl WeightFormat {
    /// Whether a matrix [N, K] is kept in e4m3.
    fn is_fp8(self, rows: usize, cols: usize) -> bool {
        let even = rows.is_multiple_of(16) && cols.is_multiple_of(16);
        self == Self::Fp8 && even && cols <= SCALED_COLS_MAX
    }

    /// Bytes that the device holds of one of the experts of a layer, which are stored alike.
    pub fn expert_bytes(self, stack: &[PartShape]) -> u64 {
        let (numbers, extent) = self.expert_records(stack);
        skinny::Bytes::of(numbers, extent).all() as u64
    }

    /// What the records of an expert's matrix hold. Those of permuted columns, of which each expert
    /// has an order of its own, are rounded.
    pub(super) fn expert_records(self, stack: &[PartShape]) -> (Numbers, Extent) {
        let (rows, cols) = PartShape::stacked(stack);
        match int4::records(stack) {
            Some((numbers, extent, false)) => (numbers, extent),
            _ => (self.rounded((rows, cols)), Extent::plain((rows, cols))),
        }
    }

    /// What a matrix [N, K] in records is rounded to.
    fn rounded(self, (rows, cols): (usize, usize)) -> Numbers {
        if self.is_fp8(rows, cols) { Numbers::E4m3 } else { Numbers::Bf16 }
    }

    /// Bytes that the device holds of matrices, stacked by rows, that are uploaded as one weight.
    pub fn bytes(self, stack: &[PartShape]) -> u64 {
        int4::bytes(stack).map_or_else(|| self.rounded_bytes(stack), |bytes| bytes as u64)
    }

    /// As [`Self::bytes`], of a table (`Backend::table`).
    pub fn table_bytes(stack: &[PartShape]) -> u64 {
        let (rows, cols) = PartShape::stacked(stack);
        (rows * cols * Element::Bf16.bytes()) as u64
    }

    fn rounded_bytes(self, stack: &[PartShape]) -> u64 {
        let (rows, cols) = PartShape::stacked(stack);
        match self.records((rows, cols)) {
            Some(numbers) => skinny::bytes(numbers, Extent::plain((rows, cols))) as u64,
            None => Self::table_bytes(stack),
        }
    }

    /// What the records of a matrix [N, K] consist of; `None` where it is kept as rows of bf16.
    fn records(self, (rows, cols): (usize, usize)) -> Option<Numbers> {
        in_records((rows, cols)).then(|| self.rounded((rows, cols)))
    }
}

/// Bytes of the workspace that products of up to `tokens` rows with a stack want.
pub(super) fn workspace_bytes(
    format: WeightFormat,
    stack: &[PartShape],
    tokens: usize,
    fp8_products: bool,
) -> usize {
    let rounded = || {
        let (rows, cols) = PartShape::stacked(stack);
        Some((format.records((rows, cols))?, Extent::plain((rows, cols)), false))
    };
    let Some((numbers, extent, is_permuted)) = int4::records(stack).or_else(rounded) else {
        return 0;
    };
    let of = |m: usize| {
        let gathered = if is_permuted { gathered_bytes(m, extent) } else { 0 };
        gathered.saturating_add(product_bytes(m, numbers, extent, fp8_products))
    };
    // The most rows of either way.
    of(tokens.min(RECORDS_ROWS_MAX)).max(of(tokens))
}

/// m rows of x in the order of a weight's columns.
fn gathered_bytes(m: usize, extent: Extent) -> usize {
    aligned(m, extent.cols * Element::Bf16.bytes())
}

/// A weight [N, K] on the device.
pub struct Weight<D: Driver> {
    rows: usize,
    cols: usize,
    stored: Stored<D>,
}

/// What the device holds.
enum Stored<D: Driver> {
    /// bf16, row-major.
    Rows(Array<D>),
    /// bf16 or e4m3.
    Records(Records<D>),
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
        Self::upload_as(device, parts, format, 0)
    }

    /// As [`Self::upload`], for [`Cuda::gated_product`]: rows of gate and up lie in turn, where
    /// there are records and outputs are whole vectors.
    pub(super) fn upload_gate_up(
        device: &Cuda<D>,
        parts: &[WeightPart<'_>],
        format: WeightFormat,
    ) -> Result<Self, KernelError> {
        let (rows, _) = WeightPart::check(parts)?;
        let pairs = if rows.is_multiple_of(2 * VECTOR) { rows / 2 } else { 0 };
        Self::upload_as(device, parts, format, pairs)
    }

    /// `pairs` as [`Extent`]'s.
    fn upload_as(
        device: &Cuda<D>,
        parts: &[WeightPart<'_>],
        format: WeightFormat,
        pairs: usize,
    ) -> Result<Self, KernelError> {
        let (rows, cols) = WeightPart::check(parts)?;
        let stored = match (Int4::new(device, parts, pairs)?, format.records((rows, cols))) {
            (Some(values), _) => Stored::Int4(values),
            (None, Some(numbers)) => {
                let extent = Extent { pairs, ..Extent::plain((rows, cols)) };
                Stored::Records(upload::records(device, parts, extent, numbers)?)
            }
            (None, None) => {
                device.driver.expect_products((rows, cols), false)?;
                Stored::Rows(upload::bf16(device, parts, (rows, cols))?)
            }
        };
        Ok(Self { rows, cols, stored })
    }

    /// Every stored format, rounded to bf16.
    pub(super) fn upload_table(
        device: &Cuda<D>,
        parts: &[WeightPart<'_>],
    ) -> Result<Self, KernelError> {
        let (rows, cols) = WeightPart::check(parts)?;
        let stored = Stored::Rows(upload::bf16(device, parts, (rows, cols))?);
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

    /// Whether its rows are pairs of gate and up, which few rows of x are multiplied with at once.
    fn is_paired(&self) -> bool {
        match &self.stored {
            Stored::Rows(_) => false,
            Stored::Records(records) | Stored::Int4(Int4 { records, .. }) => {
                records.extent().pairs > 0
            }
        }
    }

    /// Where the rows [N, K] lie as bf16.
    ///
    /// # Errors
    /// `KernelError::Weight` where they do not.
    pub(super) fn table(&self, driver: &D) -> Result<u64, KernelError> {
        match &self.stored {
            Stored::Rows(values) => Ok(values.address(driver)),
            Stored::Records(_) | Stored::Int4(_) => Err(KernelError::Weight(
                "packed rows cannot be looked up; upload the matrix as a table".into(),
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
        ensure("linear", !weight.is_paired(), || {
            "a weight of gate and up is multiplied by `gated` alone".into()
        })?;
        let call = Call { x: self.at(x), m: x.rows, bias: bias.map(|bias| self.at(bias)) };
        self.multiply(out, weight, call)
    }

    /// out [T, I] = silu(gate) · up of x · weightᵀ, which many rows leave in `room` [T, 2 I] first.
    /// The bits are those of the two ops.
    pub(super) fn gated_product(
        &self,
        out: &mut Tensor<Self>,
        room: &mut Tensor<Self>,
        x: &Tensor<Self>,
        weight: &Weight<D>,
    ) -> Result<(), KernelError> {
        bf16_vectors("gated", &[out, room])?;
        let fits = x.data.element() == Element::Bf16;
        ensure("gated", fits, || "activations are not bf16".into())?;
        let call = Call { x: self.at(x), m: x.rows, bias: None };
        if weight.is_paired() && x.rows <= RECORDS_ROWS_MAX {
            return self.multiply(out, weight, call);
        }
        self.multiply(room, weight, call)?;
        self.gate(out, room)
    }

    /// Of a paired weight and rows that records are multiplied with, `out` is [T, I].
    fn multiply(
        &self,
        out: &mut Tensor<Self>,
        weight: &Weight<D>,
        call: Call,
    ) -> Result<(), KernelError> {
        if call.m == 0 {
            return Ok(());
        }
        match &weight.stored {
            Stored::Rows(values) => {
                let values = values.address(&self.driver);
                self.driver.gemm(self.gemm(out, (weight.rows, weight.cols), call, values))
            }
            Stored::Records(records) => self.records_product(out, records, call, 0),
            Stored::Int4(Int4 { records, order: None }) => {
                self.records_product(out, records, call, 0)
            }
            Stored::Int4(int4 @ Int4 { records, order: Some(order) }) => {
                let bytes = gathered_bytes(call.m, records.extent());
                // For the whole product at once: the workspace moves as it grows.
                let gathered = self.workspace(bytes + self.product_bytes(records, call.m))?;
                self.gather_columns(gathered, (call.x, call.m, weight.cols), int4, order)?;
                self.records_product(out, records, Call { x: gathered, ..call }, bytes)
            }
        }
    }

    /// A product of bf16 by the device.
    fn gemm(&self, out: &Tensor<Self>, (n, k): (usize, usize), call: Call, weight: u64) -> Gemm {
        Gemm {
            out: self.at(out),
            out_element: out.data.element(),
            x: call.x,
            weight,
            scales: None,
            bias: call.bias,
            m: call.m,
            n,
            k,
        }
    }

    /// What a product with a weight in records needs of the workspace.
    fn product_bytes(&self, weight: &Records<D>, m: usize) -> usize {
        let fp8_products = self.driver.facts().fp8_products();
        product_bytes(m, weight.numbers(), weight.extent(), fp8_products)
    }

    /// The first `taken` bytes of the workspace are the caller's.
    fn records_product(
        &self,
        out: &mut Tensor<Self>,
        weight: &Records<D>,
        call: Call,
        taken: usize,
    ) -> Result<(), KernelError> {
        let (Call { x, m, bias }, extent) = (call, weight.extent());
        let fits = i32::try_from(m).is_ok();
        ensure("linear", fits, || format!("{m} rows of one product are too many"))?;
        let free = match taken + self.product_bytes(weight, m) {
            0 => 0,
            bytes => self.workspace(bytes)? + taken as u64,
        };
        let shape = (extent.rows, extent.cols);
        match route(m, weight.numbers(), extent, self.driver.facts().fp8_products()) {
            Route::Records => {
                let inputs = Inputs { x, m, bias, sums: free };
                self.multiply_records(&mut out.data, weight, inputs)
            }
            Route::Bf16 => {
                self.unpack_rows(free, weight)?;
                self.driver.gemm(self.gemm(out, shape, call, free))
            }
            Route::Codes => {
                let scales = free + aligned(m, extent.cols) as u64;
                let codes = scales + aligned(m, size_of::<f32>()) as u64;
                let (rows, cols) = (m as u64, extent.cols as u64);
                self.quantize_rows(&ScaledRows { codes: free, scales, x, rows, cols })?;
                self.unpack_codes(codes, weight)?;
                let of_weight = weight.scales().map_or(0, |scales| scales.address(&self.driver));
                let scales = Some(Scales { x: scales, weight: of_weight });
                let gemm = self.gemm(out, shape, call, codes);
                self.driver.gemm(Gemm { x: free, scales, ..gemm })
            }
        }
    }
}

/// What is multiplied by a weight, by address.
#[derive(Clone, Copy)]
struct Call {
    /// [m, K] in bf16.
    x: u64,
    m: usize,
    /// [N] in bf16.
    bias: Option<u64>,
}
