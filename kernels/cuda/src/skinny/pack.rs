//! Rows into records and out of them. Kernels: `skinny_pack.cu`.

use super::{Extent, Numbers, Place, Records};
use crate::{Cuda, Driver, Launch};
use kernels::KernelError;

const THREADS: usize = 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct PackArgs {
    weight: u64,
    from: u64,
    first: u32,
    rows: u32,
    cols: u32,
    records: u32,
    pairs: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UnpackArgs {
    weight: u64,
    scales: u64,
    out: u64,
    rows: u32,
    cols: u32,
    lead: u32,
    records: u32,
    strips: u32,
    pairs: u32,
}

impl<D: Driver> Cuda<D> {
    /// Writes rows `first` and on from [rows, K] at `from`: bf16, or e4m3.
    pub(crate) fn pack_rows(
        &self,
        to: &Place,
        (first, rows): (usize, usize),
        from: u64,
    ) -> Result<(), KernelError> {
        let args = PackArgs {
            weight: to.values,
            from,
            first: first as u32,
            rows: rows as u32,
            cols: to.extent.cols as u32,
            records: to.extent.records(to.numbers) as u32,
            pairs: to.extent.pairs as u32,
            unused: 0,
        };
        let kernel = match to.numbers {
            Numbers::E4m3 => "skinny_pack_e4m3",
            Numbers::Bf16 | Numbers::Int4 { .. } => "skinny_pack_bf16",
        };
        let blocks = (rows * to.extent.cols / 8).div_ceil(THREADS) as u32;
        self.driver.launch(Launch::new(kernel, [blocks, 1, 1], THREADS as u32, &args))
    }

    /// [N, K] as rows in bf16 in the matrix's order, at `to`.
    pub(crate) fn unpack_rows(&self, to: u64, weight: &Records<D>) -> Result<(), KernelError> {
        self.unpack(to, weight, weight.numbers.kernels().unpack)
    }

    /// As [`Self::unpack_rows`], of e4m3 as it is, of a weight that is of it.
    pub(crate) fn unpack_codes(&self, to: u64, weight: &Records<D>) -> Result<(), KernelError> {
        self.unpack(to, weight, "skinny_unpack_codes")
    }

    fn unpack(&self, to: u64, weight: &Records<D>, kernel: &str) -> Result<(), KernelError> {
        let Extent { rows, cols, lead, pairs } = weight.extent;
        let (strips, records) = (weight.extent.strips(), weight.extent.records(weight.numbers));
        let args = UnpackArgs {
            weight: weight.values.address(&self.driver),
            scales: weight.scales().map_or(0, |scales| scales.address(&self.driver)),
            out: to,
            rows: rows as u32,
            cols: cols as u32,
            lead: lead as u32,
            records: records as u32,
            strips: strips as u32,
            pairs: pairs as u32,
        };
        // A warp for each record.
        let blocks = (strips * records * 32).div_ceil(THREADS) as u32;
        self.driver.launch(Launch::new(kernel, [blocks, 1, 1], THREADS as u32, &args))
    }
}
