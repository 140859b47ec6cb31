//! The matrix product, which on a real device is a library's.

use cuda::{Element, Gemm};
use half::bf16;
use kernels::KernelError;

/// Numbers of device memory, which is host memory here.
///
/// # Safety
/// `len` of them lie at `address`, and nobody writes them meanwhile.
unsafe fn at<'a, T>(address: u64, len: usize) -> &'a [T] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(address as *const T, len) }
}

/// e4m3: a sign, 4 bits of exponent biased by 7, 3 of mantissa; all ones are NaN.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// What the library refuses is refused here too.
fn check(gemm: &Gemm) -> Result<(), KernelError> {
    let aligned = gemm.n.is_multiple_of(16) && gemm.k.is_multiple_of(16);
    if gemm.scales.is_some() && !aligned {
        let text = format!("no product in fp8 by [{}, {}]", gemm.n, gemm.k);
        return Err(KernelError::Device(text));
    }
    if gemm.bias.is_some() && gemm.out_element != Element::Bf16 {
        return Err(KernelError::Device("no product in f32 has a bias in bf16".into()));
    }
    Ok(())
}

/// # Errors
/// `KernelError::Device` for what cuBLASLt has no algorithm for.
pub(super) fn run(gemm: &Gemm) -> Result<(), KernelError> {
    check(gemm)?;
    let Gemm { m, n, k, .. } = *gemm;
    // SAFETY: the launcher's addresses point to as many elements as the shapes say.
    let bf16s = |address, len| unsafe { at::<bf16>(address, len) }.iter().map(|v| v.to_f32());
    // SAFETY: as above.
    let codes = |address, len| unsafe { at::<u8>(address, len) }.iter().map(|v| e4m3(*v));
    let widened = |address, len| -> Vec<f32> {
        if gemm.scales.is_some() {
            codes(address, len).collect()
        } else {
            bf16s(address, len).collect()
        }
    };
    let (x, weight) = (widened(gemm.x, m * k), widened(gemm.weight, n * k));
    let bias: Option<Vec<f32>> = gemm.bias.map(|bias| bf16s(bias, n).collect());
    // SAFETY: as above.
    let scales = gemm.scales.map(|to| unsafe { (at::<f32>(to.x, m), at::<f32>(to.weight, n)) });
    for (row, x) in x.chunks_exact(k).enumerate() {
        for (col, weight) in weight.chunks_exact(k).enumerate() {
            let sum: f32 = x.iter().zip(weight).map(|(x, w)| x * w).sum();
            let sum = scales.map_or(sum, |(of_x, of_weight)| sum * of_x[row] * of_weight[col]);
            let sum = sum + bias.as_ref().map_or(0.0, |bias| bias[col]);
            let at = row * n + col;
            // SAFETY: out is [m, n] of its element, as the launcher promises.
            unsafe {
                match gemm.out_element {
                    Element::F32 => *(gemm.out as *mut f32).add(at) = sum,
                    Element::Bf16 => *(gemm.out as *mut bf16).add(at) = bf16::from_f32(sum),
                }
            }
        }
    }
    Ok(())
}
