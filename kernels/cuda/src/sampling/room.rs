//! Device memory for sampling, made once.

use super::{
    OP,
    request::{Packed, packed_row_bytes},
};
use crate::{Array, Driver};
use kernels::{KernelError, sampling::TOP_MAX, shape::ensure};

/// Constants of `sampling.cuh`, by their names there.
const SPAN: usize = 512;
pub(super) const SPANS_MAX: usize = 1024;
pub(super) const PASS_THREADS: u32 = 256;
const PASS_SPANS: usize = 8;
const BINS: usize = 512;
const HISTOGRAM_SPANS: usize = 24;
pub(super) const CANDIDATES: usize = 4096;

/// Bytes of structs there.
const SCAN_PART: usize = 16;
const SPAN_PART: usize = 16;
const BOUNDS: usize = 40;
const OUT: usize = 16 + 8 * TOP_MAX;

/// The most rows of one launch.
const ROWS_MAX: usize = 65_535;

/// `SampleArgs` of `sampling.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Args {
    logits: u64,
    rows: u64,
    adjustments: u64,
    biases: u64,
    masks: u64,
    saved: u64,
    scans: u64,
    span_parts: u64,
    counts: u64,
    masses: u64,
    bounds: u64,
    span_masses: u64,
    candidates: u64,
    out: u64,
    vocab: u32,
    drawable: u32,
    spans: u32,
    pub scans_len: u32,
    pub histograms_len: u32,
    mask_words: u32,
    adjusted: u32,
    unused: u32,
}

impl Args {
    /// For the scan after bias and penalties.
    pub fn once_adjusted(self) -> Self {
        Self { adjusted: 1, ..self }
    }
}

/// Bytes of a row in each of [`SampleRoom`]'s arrays from `scans` on.
fn row_bytes(vocab: usize) -> [usize; 8] {
    let spans = vocab.div_ceil(SPAN);
    let bins = spans.div_ceil(HISTOGRAM_SPANS) * BINS;
    [
        spans.div_ceil(PASS_SPANS) * SCAN_PART,
        spans * SPAN_PART,
        bins * size_of::<u32>(),
        bins * size_of::<u64>(),
        BOUNDS,
        spans * size_of::<u64>(),
        CANDIDATES * size_of::<u32>(),
        OUT,
    ]
}

/// Bytes of a [`SampleRoom`] whose rows have up to `adjusted` biased or seen tokens each.
pub(crate) fn bytes(rows: usize, vocab: usize, adjusted: usize) -> usize {
    let room: usize = row_bytes(vocab).iter().sum();
    let request = packed_row_bytes(vocab, adjusted);
    let saved = adjusted * size_of::<f32>();
    // As both grow.
    rows * room + (rows * request).next_power_of_two() + (rows * saved).next_power_of_two()
}

/// What the kernels of one call leave for each other.
pub struct SampleRoom<D: Driver> {
    vocab: usize,
    drawable: usize,
    rows_max: usize,
    /// Requests; grows with bias, penalties and masks.
    requests: Array<D>,
    /// Logits while they are changed; grows with bias and penalties.
    saved: Array<D>,
    scans: Array<D>,
    span_parts: Array<D>,
    counts: Array<D>,
    masses: Array<D>,
    bounds: Array<D>,
    span_masses: Array<D>,
    candidates: Array<D>,
    out: Array<D>,
}

/// `SampleOut` of `sampling.cuh`.
pub(super) struct Out {
    pub token: i32,
    pub status: u32,
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

impl<D: Driver> SampleRoom<D> {
    pub(super) fn new(
        driver: &D,
        rows_max: usize,
        vocab: usize,
        drawable: usize,
    ) -> Result<Self, KernelError> {
        let made_for = (1..SPANS_MAX * SPAN).contains(&vocab) && (1..=vocab).contains(&drawable);
        ensure(OP, made_for && rows_max <= ROWS_MAX, || {
            format!("no kernel for {rows_max} rows of {vocab} logits, {drawable} of them tokens")
        })?;
        let array = |each: usize| Array::zeroed(driver, "sampling", rows_max * each);
        let [scans, span_parts, counts, masses, bounds, span_masses, candidates, out] =
            row_bytes(vocab);
        Ok(Self {
            vocab,
            drawable,
            rows_max,
            requests: Array::zeroed(driver, "sampling", 0)?,
            saved: Array::zeroed(driver, "sampling", 0)?,
            scans: array(scans)?,
            span_parts: array(span_parts)?,
            counts: array(counts)?,
            masses: array(masses)?,
            bounds: array(bounds)?,
            span_masses: array(span_masses)?,
            candidates: array(candidates)?,
            out: array(out)?,
        })
    }

    /// Logits of a row.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    pub fn rows_max(&self) -> usize {
        self.rows_max
    }

    /// Writes the requests, in one piece, and says where everything is.
    pub(super) fn upload(
        &mut self,
        driver: &D,
        packed: &Packed,
        logits: u64,
    ) -> Result<Args, KernelError> {
        let mut bytes = Vec::new();
        let mut starts = [0; 4];
        let parts = [&packed.rows, &packed.adjustments, &packed.biases, &packed.masks];
        for (start, part) in starts.iter_mut().zip(parts) {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            *start = bytes.len() as u64;
            bytes.extend_from_slice(part);
        }
        grow(driver, &mut self.requests, bytes.len())?;
        grow(driver, &mut self.saved, packed.adjustments.len() / 4)?;
        self.requests.write(driver, &bytes)?;
        let requests = self.requests.address(driver);
        let [rows, adjustments, biases, masks] = starts.map(|start| requests + start);
        let spans = self.vocab.div_ceil(SPAN);
        Ok(Args {
            logits,
            rows,
            adjustments,
            biases,
            masks,
            saved: self.saved.address(driver),
            scans: self.scans.address(driver),
            span_parts: self.span_parts.address(driver),
            counts: self.counts.address(driver),
            masses: self.masses.address(driver),
            bounds: self.bounds.address(driver),
            span_masses: self.span_masses.address(driver),
            candidates: self.candidates.address(driver),
            out: self.out.address(driver),
            vocab: self.vocab as u32,
            drawable: self.drawable as u32,
            spans: spans as u32,
            scans_len: spans.div_ceil(PASS_SPANS) as u32,
            histograms_len: spans.div_ceil(HISTOGRAM_SPANS) as u32,
            mask_words: self.vocab.div_ceil(32) as u32,
            adjusted: 0,
            unused: 0,
        })
    }

    /// The answers of the first `rows` rows, once they are there.
    pub(super) fn read(&self, driver: &D, rows: usize) -> Result<Vec<Out>, KernelError> {
        let mut bytes = vec![0; rows * OUT];
        self.out.read(driver, &mut bytes)?;
        Ok(bytes.as_chunks::<OUT>().0.iter().map(Out::parse).collect())
    }
}

/// Makes room for `bytes`; to the next power of two, so that few steps come here.
fn grow<D: Driver>(driver: &D, array: &mut Array<D>, bytes: usize) -> Result<(), KernelError> {
    if bytes > array.bytes() {
        *array = Array::zeroed(driver, "sampling", bytes.next_power_of_two())?;
    }
    Ok(())
}

impl Out {
    fn parse(bytes: &[u8; OUT]) -> Self {
        let words = bytes.as_chunks::<4>().0;
        let word = |at: usize| u32::from_le_bytes(words[at]);
        let number = |at: usize| f32::from_le_bytes(words[at]);
        let top = (word(3) as usize).min(TOP_MAX);
        Self {
            token: i32::from_le_bytes(words[0]),
            status: word(1),
            logprob: number(2),
            top: (0..top).map(|n| (word(4 + n), number(4 + TOP_MAX + n))).collect(),
        }
    }
}
