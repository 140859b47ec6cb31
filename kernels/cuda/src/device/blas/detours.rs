//! Ways around products that cuBLASLt refuses: slower, and within the same rounding.
//!
//! 1. The plain product to f32 (codes of e4m3 as they are), then scales and bias by a kernel of our
//!    own: for a library without vectors of scales, or that adds no bias there.
//! 2. Both operands widened to bf16, a piece at a time, then that product: for a library that
//!    multiplies no e4m3 of this shape.

use super::{
    Asked, Blas, Launcher, TOLD_MAX,
    product::{Input, Product},
};
use crate::{Element, Launch, fp8::ScaleArgs};
use kernels::KernelError;

/// What one region of the scratch memory holds.
pub(super) const REGION_BYTES: usize = 32 << 20;
/// As `epilogue.cu` and `fp8.cu` have them.
const EPILOGUE_THREADS: u32 = 256;
const DEQUANTIZE_THREADS: u32 = 256;
const DEQUANTIZE_VECTORS: usize = 512;
const VECTOR: usize = 8;

/// Rows of a piece where there is room for so many: as many as let the next piece begin at a
/// multiple of 256 bytes, which the library's algorithms count on.
fn pieces_of(rows: usize) -> usize {
    const ALIGNED: usize = 128;
    if rows < ALIGNED { rows } else { rows / ALIGNED * ALIGNED }
}

/// As the kernel's own.
#[repr(C)]
#[derive(Clone, Copy)]
struct EpilogueArgs {
    out: u64,
    sums: u64,
    x_scales: u64,
    weight_scales: u64,
    bias: u64,
    elements: u64,
    cols: u64,
    stride: u64,
    f32_out: u64,
}

impl Blas {
    /// A product that was refused whole.
    pub(super) fn around(
        &mut self,
        launch: Launcher<'_>,
        product: &Product,
    ) -> Result<(), KernelError> {
        if self.apart(launch, product)? == Asked::Done {
            self.tell(product, "scales and bias by a kernel of our own");
            return Ok(());
        }
        if self.widened(launch, product)? == Asked::Done {
            self.tell(product, "widened to bf16 first");
            return Ok(());
        }
        let hint = match product.input {
            Input::Fp8(_) => "; products in fp8 take cuBLASLt 12.9 or later",
            Input::Bf16 => "",
        };
        Err(KernelError::Device(format!("cuBLASLt has no algorithm for {product}{hint}")))
    }

    fn tell(&mut self, product: &Product, how: &str) {
        if self.told.len() < TOLD_MAX {
            self.told.insert(format!("{product}: {how}"));
        }
    }

    /// Sums first, rows as many at a time as there is room for, then the rest.
    fn apart(&mut self, launch: Launcher<'_>, product: &Product) -> Result<Asked, KernelError> {
        let rows_each = pieces_of(REGION_BYTES / (product.n * Element::F32.bytes()));
        if rows_each == 0 {
            return Ok(Asked::Refused);
        }
        let [sums, ..] = self.scratch()?;
        let (input, scales) = match product.input {
            Input::Bf16 => (Input::Bf16, None),
            Input::Fp8(scales) => (Input::Fp8(None), scales),
        };
        for first in (0..product.m).step_by(rows_each) {
            let rows = rows_each.min(product.m - first);
            let plain = Product {
                out: sums,
                stride: product.n,
                f32_out: true,
                x: product.x + first as u64 * product.input_row_bytes(),
                input,
                bias: None,
                m: rows,
                ..*product
            };
            if self.whole(&plain)? == Asked::Refused {
                return Ok(Asked::Refused);
            }
            let elements = rows * product.n;
            let args = EpilogueArgs {
                out: product.out + (first * product.stride * product.out_bytes()) as u64,
                sums,
                x_scales: scales.map_or(0, |s| s.x + (first * Element::F32.bytes()) as u64),
                weight_scales: scales.map_or(0, |s| s.weight),
                bias: product.bias.unwrap_or(0),
                elements: elements as u64,
                cols: product.n as u64,
                stride: product.stride as u64,
                f32_out: u64::from(product.f32_out),
            };
            let blocks = elements.div_ceil(EPILOGUE_THREADS as usize) as u32;
            launch(Launch::new("product_epilogue", [blocks, 1, 1], EPILOGUE_THREADS, &args))?;
        }
        Ok(Asked::Done)
    }

    /// Pieces of both operands in bf16, each with each.
    fn widened(&mut self, launch: Launcher<'_>, product: &Product) -> Result<Asked, KernelError> {
        let Input::Fp8(Some(scales)) = product.input else { return Ok(Asked::Refused) };
        let Product { m, n, k, .. } = *product;
        let rows_each = pieces_of(REGION_BYTES / (k * Element::Bf16.bytes()));
        if rows_each == 0 {
            return Ok(Asked::Refused);
        }
        let [_, x, weight] = self.scratch()?;
        let widen = |to, (codes, scales): (u64, u64), first: usize, rows: usize| {
            let vectors = rows * k / VECTOR;
            let args = ScaleArgs {
                codes: codes + (first * k) as u64,
                x: to,
                scales: scales + (first * Element::F32.bytes()) as u64,
                vectors: vectors as u32,
                row_vectors: (k / VECTOR) as u32,
            };
            let blocks = vectors.div_ceil(DEQUANTIZE_VECTORS) as u32;
            launch(Launch::new("dequantize_bf16", [blocks, 1, 1], DEQUANTIZE_THREADS, &args))
        };
        for row in (0..m).step_by(rows_each) {
            let rows = rows_each.min(m - row);
            widen(x, (product.x, scales.x), row, rows)?;
            for col in (0..n).step_by(rows_each) {
                let cols = rows_each.min(n - col);
                widen(weight, (product.weight, scales.weight), col, cols)?;
                let at = (row * product.stride + col) * product.out_bytes();
                let piece = Product {
                    out: product.out + at as u64,
                    x,
                    weight,
                    input: Input::Bf16,
                    bias: product.bias.map(|bias| bias + (col * Element::Bf16.bytes()) as u64),
                    m: rows,
                    n: cols,
                    ..*product
                };
                let refused = self.whole(&piece)? == Asked::Refused;
                if refused && self.apart(launch, &piece)? == Asked::Refused {
                    return Ok(Asked::Refused);
                }
            }
        }
        Ok(Asked::Done)
    }
}
