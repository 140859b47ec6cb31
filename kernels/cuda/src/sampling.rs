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
    Batch, KernelError, Tensor,
    sampling::{Refused, SampleRequest, Sampled, TOP_MAX},
    shape::ensure,
};
use request::Packed;
use room::{Args, Asked, CANDIDATES, Out, PASS_THREADS, SPANS_MAX};

const OP: &str = "sample";
/// Requests of up to so many bytes go with the step: any of a few hundred rows, without masks.
pub(super) const ALONG_BYTES: usize = 64 << 10;
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

    /// Keeps what is asked of the rows of the next step, which takes it along.
    pub(super) fn ask_of_step(
        &self,
        batch: &mut Batch<Self>,
        room: &mut SampleRoom<D>,
        asked: &[(SampleRequest<'_>, Option<usize>)],
    ) -> Result<(), KernelError> {
        let packed = Packed::new(asked, room.vocab())?;
        let (bytes, starts) = packed.bytes();
        let at = match bytes.len() <= ALONG_BYTES {
            true => batch.cuts.take_along(&self.driver, &bytes),
            false => room.upload(&self.driver, &bytes)?,
        };
        room.asked = Some(Asked { packed, starts, at });
        Ok(())
    }

    /// Begins to choose for rows `first..first + logits.rows` of what was asked.
    pub(super) fn begin_sampling(
        &self,
        room: &mut SampleRoom<D>,
        logits: &mut Tensor<Self>,
        (first, last_ids): (usize, u64),
    ) -> Result<(), KernelError> {
        let (rows, cols) = (logits.rows, logits.cols);
        let nothing = || KernelError::Device("nothing was asked of the step".into());
        let asked = room.asked.take().ok_or_else(nothing)?;
        let end = first.saturating_add(rows);
        let of = asked.packed.refused.len();
        let fits = end <= of && cols == room.vocab() && rows <= logits.rows_max;
        ensure(OP, fits, || {
            let vocab = room.vocab();
            format!("logits are [{rows}, {cols}], wanted [{}, {vocab}]", of.saturating_sub(first))
        })?;
        ensure(OP, rows <= room.rows_max(), || {
            format!("{rows} rows in a room for {}", room.rows_max())
        })?;
        let exact = logits.data.element() == Element::F32;
        ensure(OP, exact, || "logits are not f32".into())?;
        if rows > 0 {
            let args = room.args(&self.driver, &asked, (self.at(logits), last_ids))?.from(first);
            self.launch_sampling(&args, &asked.packed, rows as u32)?;
        }
        room.begin_read(&self.driver, &asked, first..end)?;
        room.asked = Some(asked);
        Ok(())
    }

    /// Answers `requests`, one of each row of logits, at once.
    ///
    /// # Errors
    /// As the backend's `ask`, `sample` and `answers`.
    pub fn choose(
        &self,
        room: &mut SampleRoom<D>,
        logits: &mut Tensor<Self>,
        requests: &[SampleRequest<'_>],
    ) -> Result<Vec<Result<Sampled, Refused>>, KernelError> {
        let asked: Vec<_> = requests.iter().map(|request| (*request, None)).collect();
        let packed = Packed::new(&asked, room.vocab())?;
        ensure(OP, logits.rows == requests.len(), || {
            format!("{} requests for {} rows", requests.len(), logits.rows)
        })?;
        let (bytes, starts) = packed.bytes();
        let at = room.upload(&self.driver, &bytes)?;
        room.asked = Some(Asked { packed, starts, at });
        self.begin_sampling(room, logits, (0, 0))?;
        room.answers(&self.driver)
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
