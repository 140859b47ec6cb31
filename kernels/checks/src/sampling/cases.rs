//! One row and what is asked of it, on the device and on the host.

use crate::noise;
use cuda::{Cuda, Driver};
use engine::plan::{Admission, SamplingParams, TokenLogprob};
use kernels::{
    Backend, KernelError, Tensor,
    sampling::{NextToken, Refused, SampleRequest, Sampled, Wanted},
};
use model::{Sampler, Seen, next_token};

/// Rows of one call.
const ROWS_MAX: usize = 256;

pub struct Case {
    pub params: SamplingParams,
    /// Which of the rows.
    pub row: usize,
    pub position: usize,
    /// What penalties see, the prompt first.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    pub allowed: Option<Vec<u32>>,
    /// The token whose logprob is wanted, instead of a draw.
    pub score: Option<u32>,
}

impl Clone for Case {
    fn clone(&self) -> Self {
        Self {
            params: self.params.clone(),
            tokens: self.tokens.clone(),
            allowed: self.allowed.clone(),
            ..*self
        }
    }
}

impl Case {
    pub fn new(params: &SamplingParams, row: usize) -> Self {
        Self {
            params: params.clone(),
            row,
            position: 0,
            tokens: Vec::new(),
            prompt_len: 0,
            allowed: None,
            score: None,
        }
    }

    fn seen(&self) -> Seen {
        Seen::new(&Admission {
            params: self.params.clone(),
            tokens: self.tokens.clone(),
            prompt_len: self.prompt_len,
        })
    }

    fn next<'a>(&'a self, seen: &'a Seen) -> NextToken<'a> {
        let allowed = self.allowed.as_deref();
        NextToken { allowed, ..next_token(&self.params, seen, self.position) }
    }

    fn request<'a>(&'a self, seen: &'a Seen) -> SampleRequest<'a> {
        let wanted = self.score.map_or(Wanted::Next(self.next(seen)), Wanted::Token);
        SampleRequest { wanted, logprobs: self.params.logprobs.map(|top| top as usize) }
    }

    /// What the host answers.
    pub fn host(&self, sampler: &mut Sampler, row: &[f32]) -> Result<TokenLogprob, Refused> {
        let top = self.params.logprobs.unwrap_or(0) as usize;
        if let Some(token) = self.score {
            return sampler.score(row, token, top);
        }
        let seen = self.seen();
        sampler.sample(row, &self.next(&seen), self.params.logprobs)
    }
}

pub type SampleResult = Result<Sampled, Refused>;

/// The device's answers.
pub fn run<D: Driver>(
    device: &Cuda<D>,
    drawable: usize,
    rows: &[Vec<f32>],
    cases: &[Case],
) -> Result<Vec<SampleResult>, String> {
    run_by(device, drawable, rows, cases, ROWS_MAX)
}

/// The device's answers in calls of so many rows, which share a room.
pub fn run_by<D: Driver>(
    device: &Cuda<D>,
    drawable: usize,
    rows: &[Vec<f32>],
    cases: &[Case],
    at_once: usize,
) -> Result<Vec<SampleResult>, String> {
    try_run(device, drawable, rows, cases, at_once).map_err(|error| error.to_string())?
}

fn try_run<D: Driver>(
    device: &Cuda<D>,
    drawable: usize,
    rows: &[Vec<f32>],
    cases: &[Case],
    at_once: usize,
) -> Result<Result<Vec<SampleResult>, String>, KernelError> {
    let vocab = rows[0].len();
    let mut room = device.sample_room(at_once.min(cases.len()), vocab, drawable)?;
    let mut answers = Vec::with_capacity(cases.len());
    for cases in cases.chunks(at_once) {
        let values: Vec<f32> =
            cases.iter().flat_map(|case| rows[case.row].iter().copied()).collect();
        let mut logits = Tensor::exact_from_host(device, vocab, &values)?;
        let seen: Vec<_> = cases.iter().map(Case::seen).collect();
        let requests: Vec<_> =
            cases.iter().zip(&seen).map(|(case, seen)| case.request(seen)).collect();
        answers.extend(device.choose(&mut room, &mut logits, &requests)?);
        let mut after = vec![0.0; values.len()];
        device.read_floats(&mut after, &logits.data)?;
        let same = values.iter().zip(&after).position(|(a, b)| a.to_bits() != b.to_bits());
        if let Some(at) = same {
            let (row, id) = (at / vocab, at % vocab);
            return Ok(Err(format!("row {row}, id {id}: {} became {}", values[at], after[at])));
        }
    }
    Ok(Ok(answers))
}

/// Every token the host's, every logprob near it.
pub fn agree<D: Driver>(
    device: &Cuda<D>,
    drawable: usize,
    rows: &[Vec<f32>],
    cases: &[Case],
) -> Result<(), String> {
    let vocab = rows[0].len();
    let mut sampler = Sampler::new(vocab, drawable);
    let answers = run(device, drawable, rows, cases)?;
    for (index, (case, answer)) in cases.iter().zip(&answers).enumerate() {
        let what = || format!("{vocab} logits, case {index}, {:?}", case.params);
        let wanted = case.host(&mut sampler, &rows[case.row]);
        let wanted = wanted.map_err(|error| format!("{}: the host refuses: {error}", what()))?;
        let got = answer.as_ref().map_err(|refused| format!("{}: {refused}", what()))?;
        if !near(got, &wanted) {
            return Err(format!("{}: {got:?}, the host {wanted:?}", what()));
        }
    }
    Ok(())
}

fn near(got: &Sampled, wanted: &TokenLogprob) -> bool {
    let close = |a: f32, b: f32| (a - b).abs() <= 2e-6 * b.abs().max(1.0);
    let logprobs = match (got.logprob, wanted.logprob) {
        (Some(a), Some(b)) => close(a, b),
        (None, None) => true,
        _ => false,
    };
    let top = got.top.len() == wanted.top.len()
        && got.top.iter().zip(&wanted.top).all(|(a, b)| a.0 == b.0 && close(a.1, b.1));
    got.token == wanted.token && logprobs && top
}

pub fn params() -> SamplingParams {
    SamplingParams { temperature: 1.0, seed: 0x1234_5678_9abc_def1, ..SamplingParams::GREEDY }
}

/// Sums of evenly distributed numbers, about ±6.
pub fn normal_row(len: usize, seed: u64) -> Vec<f32> {
    let parts = noise(seed + 1, 4 * len);
    parts.as_chunks::<4>().0.iter().map(|part| part.iter().sum::<f32>() * 2.5).collect()
}

/// Each filter alone at several strengths, and some together.
pub fn filters() -> Vec<SamplingParams> {
    let mut all = vec![params()];
    all.extend([1, 2, 20, 500, 5000].map(|top_k| SamplingParams { top_k, ..params() }));
    all.extend([1e-6, 0.1, 0.8, 0.95, 0.9999].map(|top_p| SamplingParams { top_p, ..params() }));
    all.extend([0.01, 0.1, 0.5, 1.0].map(|min_p| SamplingParams { min_p, ..params() }));
    all.push(SamplingParams { top_k: 20, top_p: 0.8, ..params() });
    all.push(SamplingParams { top_k: 300, top_p: 0.99, min_p: 0.02, ..params() });
    all.push(SamplingParams { top_p: 0.9, min_p: 0.05, ..params() });
    all
}
