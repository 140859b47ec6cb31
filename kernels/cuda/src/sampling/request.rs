//! What rows ask for, as the kernels read it.

use super::OP;
use kernels::{
    ShapeError,
    sampling::{NextToken, Refused, SampleRequest, TOP_MAX, Wanted},
    shape::ensure,
};

/// `SampleRow` of `sampling.cuh`.
#[derive(Clone, Copy, Default)]
pub(super) struct Row {
    seed: u64,
    position: u64,
    top_p: u64,
    temperature: f32,
    min_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    top_k: u32,
    adjustments_first: u32,
    adjustments_len: u32,
    mask_row: i32,
    token: i32,
    top: i32,
    table: i32,
}

/// Requests as the kernels read them.
pub(super) struct Packed {
    /// One `SampleRow` a request.
    pub rows: Vec<u8>,
    /// `Adjustment`s.
    pub adjustments: Vec<u8>,
    pub biases: Vec<u8>,
    pub masks: Vec<u8>,
    /// Why a row is not looked at.
    pub refused: Vec<Option<Refused>>,
    /// Whether a row has logprobs.
    pub logprobs: Vec<bool>,
    /// The most that one row has.
    pub adjustments_max: u32,
    /// Whether a row is drawn, whether one is filtered by top-k or top-p, has logprobs.
    pub drawn: bool,
    pub filtered: bool,
    pub reported: bool,
    adjustments_len: u32,
    biases_len: u32,
    masks_len: i32,
}

/// Bytes of one row of [`Packed`] that has a mask and `adjusted` tokens, each with a bias.
pub(super) fn packed_row_bytes(vocab: usize, adjusted: usize) -> usize {
    const ADJUSTMENT: usize = 4 * size_of::<u32>();
    let mask = vocab.div_ceil(32) * size_of::<u32>();
    Row::BYTES + adjusted * (ADJUSTMENT + size_of::<f32>()) + mask
}

impl Packed {
    /// What is asked of each row, and to which table's sequence its token is new.
    pub fn new(
        asked: &[(SampleRequest<'_>, Option<usize>)],
        vocab: usize,
    ) -> Result<Self, ShapeError> {
        let mut packed = Self {
            rows: Vec::with_capacity(asked.len() * Row::BYTES),
            adjustments: Vec::new(),
            biases: Vec::new(),
            masks: Vec::new(),
            refused: Vec::with_capacity(asked.len()),
            logprobs: Vec::with_capacity(asked.len()),
            adjustments_max: 0,
            drawn: false,
            filtered: false,
            reported: false,
            adjustments_len: 0,
            biases_len: 0,
            masks_len: 0,
        };
        for (request, table) in asked {
            packed.add(request, *table, vocab)?;
        }
        Ok(packed)
    }

    fn add(
        &mut self,
        request: &SampleRequest<'_>,
        table: Option<usize>,
        vocab: usize,
    ) -> Result<(), ShapeError> {
        let top = match request.logprobs {
            None => -1,
            Some(top) => {
                let most =
                    format_args!("{top} likeliest tokens wanted, at most {TOP_MAX} are told")
                        .to_string();
                ensure(OP, top <= TOP_MAX, || most)?;
                top as i32
            }
        };
        let refused = request.refused(vocab);
        let mut row = Row { token: 0, top: -1, mask_row: -1, ..Row::default() };
        match request.wanted {
            _ if refused.is_some() => {}
            Wanted::Token(token) => row = Row { token: token as i32, top, ..row },
            Wanted::Next(next) => row = Row { top, ..self.next(&next, vocab)? },
        }
        row.table = table.map_or(-1, |table| table as i32);
        self.refused.push(refused);
        self.logprobs.push(request.logprobs.is_some());
        self.reported |= row.top >= 0;
        row.put(&mut self.rows);
        Ok(())
    }

    fn next(&mut self, next: &NextToken<'_>, vocab: usize) -> Result<Row, ShapeError> {
        let mut row = Row {
            seed: next.seed,
            position: next.position,
            top_p: fixed_share(next.top_p),
            temperature: next.temperature,
            min_p: next.min_p,
            repetition_penalty: next.repetition_penalty,
            presence_penalty: next.presence_penalty,
            frequency_penalty: next.frequency_penalty,
            top_k: if (next.top_k as usize) < vocab { next.top_k } else { 0 },
            mask_row: -1,
            token: -1,
            ..Row::default()
        };
        row.adjustments_first = self.adjustments_len;
        self.adjust(next, vocab)?;
        row.adjustments_len = self.adjustments_len - row.adjustments_first;
        self.adjustments_max = self.adjustments_max.max(row.adjustments_len);
        if let Some(allowed) = next.allowed {
            let words = vocab.div_ceil(32);
            ensure(OP, allowed.len() == words, || {
                format!("a mask of {} words, wanted {words}", allowed.len())
            })?;
            row.mask_row = self.masks_len;
            self.masks_len += 1;
            self.masks.extend(allowed.iter().flat_map(|word| word.to_le_bytes()));
        }
        self.drawn |= row.temperature > 0.0;
        self.filtered |= row.temperature > 0.0 && (row.top_k > 0 || row.top_p > 0);
        Ok(row)
    }

    /// Merges bias and seen tokens: one entry an id, so that no two threads change one logit.
    fn adjust(&mut self, next: &NextToken<'_>, vocab: usize) -> Result<(), ShapeError> {
        let ascends = next.seen.is_sorted_by(|a, b| a.0 < b.0);
        ensure(OP, ascends, || "seen tokens do not ascend".into())?;
        let mut biases = next.logit_bias.to_vec();
        biases.sort_by_key(|&(id, _)| id);
        let within = next.seen.partition_point(|&(id, _)| (id as usize) < vocab);
        let mut seen = next.seen[..within].iter().peekable();
        for run in biases.chunk_by(|a, b| a.0 == b.0) {
            let id = run[0].0;
            while let Some(&&(earlier, count)) = seen.peek().filter(|entry| entry.0 < id) {
                self.adjustment(earlier, Some(count), 0);
                seen.next();
            }
            let count = seen.next_if(|entry| entry.0 == id).map(|entry| entry.1);
            self.adjustment(id, count, run.len());
            self.biases.extend(run.iter().flat_map(|(_, bias)| bias.to_le_bytes()));
            self.biases_len += run.len() as u32;
        }
        for &(id, count) in seen {
            self.adjustment(id, Some(count), 0);
        }
        Ok(())
    }

    fn adjustment(&mut self, id: u32, seen: Option<u32>, biases: usize) {
        let seen = seen.map_or(0, |count| count.saturating_add(1));
        for word in [id, seen, self.biases_len, biases as u32] {
            self.adjustments.extend(word.to_le_bytes());
        }
        self.adjustments_len += 1;
    }
}

impl Packed {
    /// All of it in one piece, and where its parts begin.
    pub fn bytes(&self) -> (Vec<u8>, [usize; 4]) {
        let (mut bytes, mut starts) = (Vec::new(), [0; 4]);
        let parts = [&self.rows, &self.adjustments, &self.biases, &self.masks];
        for (start, part) in starts.iter_mut().zip(parts) {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            *start = bytes.len();
            bytes.extend_from_slice(part);
        }
        (bytes, starts)
    }
}

impl Row {
    pub const BYTES: usize = 72;

    /// Field by field, as the struct lies in memory.
    fn put(&self, to: &mut Vec<u8>) {
        for word in [self.seed, self.position, self.top_p] {
            to.extend(word.to_le_bytes());
        }
        let penalties = [self.repetition_penalty, self.presence_penalty, self.frequency_penalty];
        for number in [self.temperature, self.min_p].into_iter().chain(penalties) {
            to.extend(number.to_le_bytes());
        }
        for word in [self.top_k, self.adjustments_first, self.adjustments_len] {
            to.extend(word.to_le_bytes());
        }
        for word in [self.mask_row, self.token, self.top, self.table] {
            to.extend(word.to_le_bytes());
        }
    }
}

/// `top_p` in units of 2^-64, exact down to 2^-40; 0 for 1, which is off.
fn fixed_share(top_p: f32) -> u64 {
    if top_p >= 1.0 {
        return 0;
    }
    ((f64::from(top_p) * 2f64.powi(64)) as u64).max(1)
}
