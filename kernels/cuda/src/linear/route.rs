//! Which kernel makes a product: by rows of x, the weight's shape and format, and the device.

use crate::{
    Element,
    skinny::{self, Extent, Numbers},
};

/// Rows of x up to which a weight in records is multiplied as it lies, up to 64 at a time, and a
/// row's bits are the same in every batch.
///
/// Each time reads the weight once. Unpacked, it is read, written and read again, at once for any
/// number of rows. With Hopper's shared memory, 192 rows take so many times of reading it:
///
/// ```text
///        as it lies                     unpacked
/// bf16   3                              3
/// e4m3   3.6, bound by tensor cores     3 as codes, 5 as bf16
/// int4   6, bound by issue slots too    8.5
/// ```
///
/// and the device's own product does not read at the speed of memory. With less shared memory fewer
/// rows are multiplied at a time.
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
pub(super) fn route(m: usize, numbers: Numbers, extent: Extent, fp8_products: bool) -> Route {
    let sixteens = extent.rows.is_multiple_of(16) && extent.cols.is_multiple_of(16);
    if m <= RECORDS_ROWS_MAX {
        Route::Records
    } else if numbers == Numbers::E4m3 && sixteens && fp8_products {
        Route::Codes
    } else {
        Route::Bf16
    }
}

/// What a product of m rows needs of the workspace.
pub(super) fn product_bytes(
    m: usize,
    numbers: Numbers,
    extent: Extent,
    fp8_products: bool,
) -> usize {
    let Extent { rows, cols, .. } = extent;
    match route(m, numbers, extent, fp8_products) {
        Route::Records => skinny::sums_bytes(extent, m),
        Route::Bf16 => rows * cols * Element::Bf16.bytes(),
        Route::Codes => {
            let (codes, scales) = (aligned(m, cols), aligned(m, size_of::<f32>()));
            codes.saturating_add(scales).saturating_add(rows * cols)
        }
    }
}

/// Bytes of the workspace for so many rows, each part at a multiple of 256.
pub(super) fn aligned(rows: usize, row_bytes: usize) -> usize {
    rows.saturating_mul(row_bytes).checked_next_multiple_of(256).unwrap_or(usize::MAX)
}
