//! Device memory for sampling, made once.

use super::{
    OP,
    request::{Packed, Row, packed_row_bytes},
};
use crate::{Array, Driver};
use kernels::{
    KernelError,
    sampling::{Refused, Sampled, TOP_MAX},
    shape::ensure,
};
use std::{collections::VecDeque, ops::Range};

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
    last_ids: u64,
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
    /// For the rows from `first` on.
    pub fn from(self, first: usize) -> Self {
        Self { rows: self.rows + (first * Row::BYTES) as u64, ..self }
    }

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
    /// What is asked of the rows of the step that was laid out last.
    pub(super) asked: Option<Asked>,
    /// What was sampled and not answered, the oldest first.
    pub(super) unanswered: VecDeque<Unanswered<D>>,
}

/// What is asked of a step's rows, on its way.
pub(super) struct Asked {
    pub packed: Packed,
    /// Of [`Packed::bytes`].
    pub starts: [usize; 4],
    /// Where those bytes are.
    pub at: u64,
}

/// Rows of one launch.
pub(super) struct Unanswered<D: Driver> {
    reading: D::Reading,
    /// Of each row, why it was not looked at, and whether it has logprobs.
    rows: Vec<(Option<Refused>, bool)>,
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
            asked: None,
            unanswered: VecDeque::new(),
        })
    }

    /// Logits of a row.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    pub fn rows_max(&self) -> usize {
        self.rows_max
    }

    /// Writes requests that are too many to go with the step; says where they are.
    pub(super) fn upload(&mut self, driver: &D, bytes: &[u8]) -> Result<u64, KernelError> {
        grow(driver, &mut self.requests, bytes.len())?;
        self.requests.write(driver, bytes)?;
        Ok(self.requests.address(driver))
    }

    /// Where everything is.
    pub(super) fn args(
        &mut self,
        driver: &D,
        asked: &Asked,
        (logits, last_ids): (u64, u64),
    ) -> Result<Args, KernelError> {
        grow(driver, &mut self.saved, asked.packed.adjustments.len() / 4)?;
        let [rows, adjustments, biases, masks] = asked.starts.map(|start| asked.at + start as u64);
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
            last_ids,
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

    /// Begins to read what becomes of rows `rows` of what was asked.
    pub(super) fn begin_read(
        &mut self,
        driver: &D,
        asked: &Asked,
        rows: Range<usize>,
    ) -> Result<(), KernelError> {
        let reading = driver.begin_read(&self.out.memory, 0, rows.len() * OUT)?;
        let Packed { refused, logprobs, .. } = &asked.packed;
        let rows = rows.map(|row| (refused[row], logprobs[row])).collect();
        self.unanswered.push_back(Unanswered { reading, rows });
        Ok(())
    }

    /// The oldest rows that were not answered.
    pub(crate) fn answers(
        &mut self,
        driver: &D,
    ) -> Result<Vec<Result<Sampled, Refused>>, KernelError> {
        let nothing = || KernelError::Device("nothing was sampled".into());
        let Unanswered { reading, rows } = self.unanswered.pop_front().ok_or_else(nothing)?;
        let bytes = driver.end_read(reading)?;
        let outs = bytes.as_chunks::<OUT>().0.iter().map(Out::parse);
        let answer = |(out, (refused, logprobs)): (Out, (Option<Refused>, bool))| match refused {
            Some(refused) => Ok(Err(refused)),
            None => out.sampled(logprobs),
        };
        outs.zip(rows).map(answer).collect()
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
