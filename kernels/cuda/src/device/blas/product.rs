//! What cuBLASLt is asked for: a [`Gemm`], or a part of the way around one that it refuses.

use crate::{Element, Gemm, Scales};
use std::fmt;

/// out [m, n] = x [m, k] · weight [n, k]ᵀ (+ bias [n]), rows of `out` `stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub out: u64,
    pub stride: usize,
    /// Else bf16.
    pub f32_out: bool,
    pub x: u64,
    pub weight: u64,
    pub input: Input,
    /// bf16.
    pub bias: Option<u64>,
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// What x and weight are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Input {
    Bf16,
    /// e4m3; codes stand for themselves where there are no scales.
    Fp8(Option<Scales>),
}

impl Product {
    pub fn of(gemm: &Gemm) -> Self {
        let Gemm { out, x, weight, bias, m, n, k, .. } = *gemm;
        let f32_out = gemm.out_element == Element::F32;
        let input = gemm.scales.map_or(Input::Bf16, |scales| Input::Fp8(Some(scales)));
        Self { out, stride: n, f32_out, x, weight, input, bias, m, n, k }
    }

    pub fn out_bytes(&self) -> usize {
        if self.f32_out { Element::F32.bytes() } else { Element::Bf16.bytes() }
    }

    /// Bytes of a row of x or of the weight.
    pub fn input_row_bytes(&self) -> u64 {
        let bytes = match self.input {
            Input::Bf16 => Element::Bf16.bytes(),
            Input::Fp8(_) => 1,
        };
        (self.k * bytes) as u64
    }
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let input = match self.input {
            Input::Bf16 => "bf16",
            Input::Fp8(_) => "fp8",
        };
        let out = if self.f32_out { "f32" } else { "bf16" };
        let bias = if self.bias.is_some() { " with a bias" } else { "" };
        let Self { m, n, k, .. } = self;
        write!(f, "a product of {m} rows by [{n}, {k}] in {input} to {out}{bias}")
    }
}
