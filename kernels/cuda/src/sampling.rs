//! Chooses tokens on the device, so that a step reads a few numbers a row instead of its logits.
//!
//! The steps and their order are the host sampler's: bias, penalties, mask, temperature, top-k,
//! top-p, min-p, draw; logprobs are those of the unmodified logits. Weights are the host's bit for
//! bit and sums are exact, so that the same token comes out as on the host but where the uniform
//! number falls within 1e-8 of a boundary. A row depends on nothing but itself. Nothing here knows
//! what a sequence is: the tokens seen, and how often, come with each call. Kernels:
//! `sampling_scan.cu`, `sampling_filter.cu`, `sampling.cu`.

mod request;
mod room;

pub use room::SampleRoom;
pub(super) use room::bytes;

use super::{Cuda, Driver, Element, Launch};
use kernels::{
    KernelError, Tensor,
    sampling::{Refused, SampleRequest, Sampled, TOP_MAX},
    shape::ensure,
};
use request::Packed;
use room::{Args, CANDIDATES, Out, PASS_THREADS, SPANS_MAX};

const OP: &str = "sample";
/// Threads of a block of `sample_bounds`, `sample_draw` and `sample_report`.
const ROW_THREADS: u32 = 512;
/// Bytes of shared memory: `Histogram` of `sampling_filter.cu`, 512 bins.
const HISTOGRAM_BYTES: u32 = 3 * 4 * 512;
/// `BoundsShared`: 512 masses and counts, scratch of 16 warps, three words and padding.
const BOUNDS_BYTES: u32 = 12 * 512 + 12 * 16 + 16;
/// `DrawShared`: scratch, four words of 64 and four of 32 bits, 256 parts, spans, candidates.
const DRAW_BYTES: u32 = 128 + 48 + 12 * 256 + 8 * (SPANS_MAX + CANDIDATES) as u32;
/// `ReportShared`: scratch of 16 warps twice, spans, and the likeliest of these with their number.
const REPORT_BYTES: u32 = 256 + 8 * SPANS_MAX as u32 + 4 * TOP_MAX as u32 + 8;
/// One `ScanPart` a warp.
const SCAN_BYTES: u32 = 16 * 8;

impl<D: Driver> Cuda<D> {
    /// Room for sampling up to `rows_max` rows of `vocab` logits each, of which the first
    /// `drawable` stand for tokens.
    ///
    /// # Errors
    /// `KernelError::Shape` for extents that no kernel was made for, `KernelError::Memory` where
    /// there is not enough.
    pub fn sample_room(
        &self,
        rows_max: usize,
        vocab: usize,
        drawable: usize,
    ) -> Result<SampleRoom<D>, KernelError> {
        SampleRoom::new(&self.driver, rows_max, vocab, drawable)
    }

    pub(super) fn choose(
        &self,
        room: &mut SampleRoom<D>,
        logits: &mut Tensor<Self>,
        requests: &[SampleRequest<'_>],
    ) -> Result<Vec<Result<Sampled, Refused>>, KernelError> {
        let (rows, cols) = (logits.rows, logits.cols);
        let fits = rows == requests.len() && cols == room.vocab() && rows <= logits.rows_max;
        ensure(OP, fits, || {
            let vocab = room.vocab();
            format!("logits are [{rows}, {cols}], wanted [{}, {vocab}]", requests.len())
        })?;
        ensure(OP, rows <= room.rows_max(), || {
            format!("{rows} rows in a room for {}", room.rows_max())
        })?;
        let exact = logits.data.element() == Element::F32;
        ensure(OP, exact, || "logits are not f32".into())?;
        if rows == 0 {
            return Ok(Vec::new());
        }
        let packed = Packed::new(requests, room.vocab())?;
        let args = room.upload(&self.driver, &packed, self.at(logits))?;
        self.launch_sampling(&args, &packed, rows as u32)?;
        let out = room.read(&self.driver, rows)?;
        let rows = packed.refused.into_iter().zip(requests).zip(out);
        rows.map(|((refused, request), out)| match refused {
            Some(refused) => Ok(Err(refused)),
            None => out.sampled(request.logprobs.is_some()),
        })
        .collect()
    }

    fn launch_sampling(&self, args: &Args, packed: &Packed, rows: u32) -> Result<(), KernelError> {
        let launch = |name, grid, threads, bytes, args: &Args| {
            self.driver.launch(Launch::new(name, grid, threads, args).shared(bytes))
        };
        let pass = [args.scans_len, rows, 1];
        let row = [rows, 1, 1];
        let changes = [packed.adjustments_max.div_ceil(PASS_THREADS), rows, 1];
        launch("sample_scan", pass, PASS_THREADS, SCAN_BYTES, args)?;
        if packed.adjustments_max > 0 {
            launch("sample_adjust", changes, PASS_THREADS, 0, args)?;
            let again = args.once_adjusted();
            launch("sample_scan", pass, PASS_THREADS, SCAN_BYTES, &again)?;
        }
        if packed.filtered {
            let grid = [args.histograms_len, rows, 1];
            launch("sample_histogram", grid, PASS_THREADS, HISTOGRAM_BYTES, args)?;
            launch("sample_bounds", row, ROW_THREADS, BOUNDS_BYTES, args)?;
        }
        if packed.drawn {
            launch("sample_spans", pass, PASS_THREADS, 0, args)?;
        }
        launch("sample_draw", row, ROW_THREADS, DRAW_BYTES, args)?;
        if packed.adjustments_max > 0 {
            launch("sample_restore", changes, PASS_THREADS, 0, args)?;
        }
        if packed.reported {
            launch("sample_report", row, ROW_THREADS, REPORT_BYTES, args)?;
        }
        Ok(())
    }
}

impl Out {
    /// What the kernels wrote, as an answer.
    fn sampled(self, logprobs: bool) -> Result<Result<Sampled, Refused>, KernelError> {
        match self.status {
            0 => {}
            1 => return Ok(Err(Refused::NotFinite)),
            2 => return Ok(Err(Refused::Adjusted)),
            3 => return Ok(Err(Refused::NothingAllowed)),
            status => {
                return Err(KernelError::Device(format!("sampling ended with status {status}")));
            }
        }
        let token = u32::try_from(self.token)
            .map_err(|_| KernelError::Device("sampling found no token".into()))?;
        let logprob = logprobs.then_some(self.logprob);
        Ok(Ok(Sampled { token, logprob, top: self.top }))
    }
}
