//! Which kernel makes a product: by rows of x, the weight's shape and format, and the device.

use crate::{
    Facts,
    skinny::{Extent, Numbers},
};

/// Rows of x up to which a weight in records is multiplied as it lies, up to 64 at a time, and a
/// row's bits are the same in every batch.
///
/// Each time reads the weight once. Unpacked, it is read, written and read again, at once for any
/// number of rows: three times of bf16 and of e4m3; of integers a time costs about twice their
/// reading (tensor cores bound it), and to unpack them eight and a half times.
pub const RECORDS_ROWS_MAX: usize = 192;

/// How a product with a weight in records is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// By our own kernel.
    Records,
    /// By the device's, with the weight unpacked to bf16.
    Bf16,
    /// By the device's in e4m3, with the weight's codes unpacked and activations rounded.
    Codes,
}

/// Whether a weight [N, K] is kept in records: its rows and those of x and out are whole vectors.
pub(super) fn in_records((rows, cols): (usize, usize)) -> bool {
    rows > 0 && cols > 0 && rows.is_multiple_of(8) && cols.is_multiple_of(8)
}

/// For m rows of x.
pub(super) fn route(m: usize, numbers: Numbers, extent: Extent, facts: &Facts) -> Route {
    let sixteens = extent.rows.is_multiple_of(16) && extent.cols.is_multiple_of(16);
    if m <= RECORDS_ROWS_MAX {
        Route::Records
    } else if numbers == Numbers::E4m3 && sixteens && facts.fp8_products() {
        Route::Codes
    } else {
        Route::Bf16
    }
}
