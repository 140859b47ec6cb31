//! The AMX tile registers: configuration and the few instructions that the products need.
//!
//! The intrinsics are not stable, so these are assembly. A thread configures its tiles at the start
//! of its share of a product and releases them at the end.

use std::{
    arch::{asm, x86_64::__m512i},
    marker::PhantomData,
};

/// Rows and bytes a row of each of the eight tiles.
pub(super) type Shapes = [(usize, usize); 8];

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Configured tiles of this thread; released when dropped.
pub(super) struct Tiles(PhantomData<*const ()>);

impl Tiles {
    /// # Safety
    /// The machine has AMX and the process its permission. No other `Tiles` of this thread is in
    /// use.
    pub unsafe fn configure(shapes: &Shapes) -> Self {
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for (tile, &(rows, bytes)) in shapes.iter().enumerate() {
            config.rows[tile] = rows as u8;
            config.row_bytes[tile] = bytes as u16;
        }
        // SAFETY: the operand is 64 bytes; tiles are offered, as the caller promises.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Self(PhantomData)
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: tiles were configured by `configure`.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

// Integer products alternate between two sets of registers, so that one product is loaded while
// another is made and a third is stored: sums in tile SET, x in 2 + SET, w in 4 + SET. None of
// these promises the compiler that it leaves memory alone: they stay where they were put among the
// vector instructions that hide their latency.

/// Loads an x, in rows of 32 bytes.
///
/// # Safety
/// `Tiles` are configured and the tile's x lies at the address.
#[inline(always)]
pub(super) unsafe fn int8_load_x<const SET: usize>(x: *const i8) {
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "tileloadd tmm{tile}, [{x} + {stride}]",
            tile = const 2 + SET,
            x = in(reg) x,
            stride = in(reg) 32usize,
            options(nostack, preserves_flags),
        );
    }
}

/// Loads a w, in rows of 64 bytes.
///
/// # Safety
/// `Tiles` are configured and the tile's w lies at the address.
#[inline(always)]
pub(super) unsafe fn int8_load_w<const SET: usize>(w: *const i8) {
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "tileloadd tmm{tile}, [{w} + {stride}]",
            tile = const 4 + SET,
            w = in(reg) w,
            stride = in(reg) 64usize,
            options(nostack, preserves_flags),
        );
    }
}

/// sums = x · w.
///
/// # Safety
/// `Tiles` are configured so that the shapes fit.
#[inline(always)]
pub(super) unsafe fn int8_product<const SET: usize>() {
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "tilezero tmm{out}",
            "tdpbssd tmm{out}, tmm{x}, tmm{w}",
            out = const SET,
            x = const 2 + SET,
            w = const 4 + SET,
            options(nostack, preserves_flags),
        );
    }
}

/// Stores the sums in rows of 64 bytes.
///
/// # Safety
/// `Tiles` are configured with at most 16 rows of 64 bytes for the sums.
#[inline(always)]
pub(super) unsafe fn int8_store<const SET: usize>(out: &mut [__m512i; 16]) {
    // SAFETY: 1 KiB is there; the rest is the caller's promise.
    unsafe {
        asm!(
            "tilestored [{out} + {stride}], tmm{tile}",
            tile = const SET,
            out = in(reg) out.as_mut_ptr(),
            stride = in(reg) 64usize,
            options(nostack, preserves_flags),
        );
    }
}

/// Zeroes the four sums of `bf16_step`.
///
/// # Safety
/// `Tiles` are configured.
#[inline(always)]
pub(super) unsafe fn bf16_zero() {
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            options(nostack, nomem, preserves_flags),
        );
    }
}

/// Tiles 0 to 3 += x[0] · w[0], x[0] · w[1], x[1] · w[0], x[1] · w[1], over 32 k.
///
/// # Safety
/// `Tiles` are configured so that 4 and 5 hold the x, 6 and 7 the w, all in rows of 64 bytes; the
/// addresses have that much behind them.
#[inline(always)]
pub(super) unsafe fn bf16_step(x: [*const u16; 2], w: [*const u8; 2]) {
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "tileloadd tmm6, [{w0} + {stride}]",
            "tileloadd tmm4, [{x0} + {stride}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + {stride}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{x1} + {stride}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            x0 = in(reg) x[0],
            x1 = in(reg) x[1],
            w0 = in(reg) w[0],
            w1 = in(reg) w[1],
            stride = in(reg) 64usize,
            options(nostack, readonly, preserves_flags),
        );
    }
}

/// Stores tiles 0 to 3 in rows of 64 bytes.
///
/// # Safety
/// `Tiles` are configured with at most 16 rows of 64 bytes each.
#[inline(always)]
pub(super) unsafe fn bf16_store(out: &mut [[[f32; 16]; 16]; 4]) {
    // SAFETY: each tile has 1 KiB of its own; the rest is the caller's promise.
    unsafe {
        asm!(
            "tilestored [{0} + {4}], tmm0",
            "tilestored [{1} + {4}], tmm1",
            "tilestored [{2} + {4}], tmm2",
            "tilestored [{3} + {4}], tmm3",
            in(reg) out[0].as_mut_ptr(),
            in(reg) out[1].as_mut_ptr(),
            in(reg) out[2].as_mut_ptr(),
            in(reg) out[3].as_mut_ptr(),
            in(reg) 64usize,
            options(nostack, preserves_flags),
        );
    }
}
