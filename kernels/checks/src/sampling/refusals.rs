//! What sampling refuses: single rows, and whole calls.

use super::cases::{Case, SampleResult, normal_row, params, run};
use crate::{BF16, Device};
use cuda::{Cuda, Driver};
use engine::plan::SamplingParams;
use kernels::{
    KernelError, Tensor,
    sampling::{NextToken, Refused, SampleRequest, Wanted},
};
use model::Sampler;

const LEN: usize = 1000;
const DRAWABLE: usize = 990;

/// Rows without an answer say why, and those beside them have theirs.
pub fn rows<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let good = normal_row(LEN, 1);
    let with = |id: usize, value: f32| {
        let mut row = good.clone();
        row[id] = value;
        row
    };
    let rows =
        [good.clone(), with(0, f32::NAN), with(600, f32::INFINITY), with(999, f32::NEG_INFINITY)];
    let plain = SamplingParams { top_p: 0.9, logprobs: Some(2), ..params() };
    let biased = |id: u32, bias: f32| {
        let params = SamplingParams { logit_bias: vec![(id, bias)], ..plain.clone() };
        Case::new(&params, 0)
    };
    let masked = |mask: &dyn Fn(usize) -> u32| {
        let allowed = Some((0..LEN.div_ceil(32)).map(mask).collect());
        Case { allowed, ..Case::new(&plain, 0) }
    };
    let no_temperature = SamplingParams { temperature: -1.0, ..plain.clone() };
    let nan = SamplingParams { min_p: f32::NAN, ..plain.clone() };
    let negative = Refused::Parameter { name: "temperature", value: -1.0 };
    let cases: [(Case, Option<Refused>); 15] = [
        (Case::new(&plain, 0), None),
        (Case::new(&plain, 1), Some(Refused::NotFinite)),
        (Case::new(&SamplingParams::GREEDY, 2), Some(Refused::NotFinite)),
        (Case::new(&plain, 3), Some(Refused::NotFinite)),
        (Case { score: Some(4), ..Case::new(&plain, 2) }, Some(Refused::NotFinite)),
        // What changes nothing about the number that is none.
        (Case { row: 3, ..biased(6, 1.0) }, Some(Refused::NotFinite)),
        (biased(6, f32::INFINITY), Some(Refused::Adjusted)),
        (biased(989, f32::NAN), Some(Refused::Adjusted)),
        // Padding may become anything.
        (biased(995, f32::INFINITY), None),
        (biased(1000, 1.0), Some(Refused::Bias { token: 1000, vocab: LEN })),
        (masked(&|_| 0), Some(Refused::NothingAllowed)),
        (masked(&|word| if word < 30 { 0 } else { !0 << 30 }), Some(Refused::NothingAllowed)),
        (Case::new(&no_temperature, 0), Some(negative)),
        (
            Case { score: Some(1000), ..Case::new(&plain, 0) },
            Some(Refused::Token { token: 1000, vocab: LEN }),
        ),
        (Case::new(&plain, 0), None),
    ];
    let asked: Vec<Case> = cases.iter().map(|(case, _)| case.clone()).collect();
    let answers = run(&device, DRAWABLE, &rows, &asked)?;
    let mut sampler = Sampler::new(LEN, DRAWABLE);
    for (index, ((case, refused), answer)) in cases.iter().zip(&answers).enumerate() {
        if answer.as_ref().err() != refused.as_ref() {
            return Err(format!("row {index}: {answer:?}, wanted {refused:?}"));
        }
        let host = case.host(&mut sampler, &rows[case.row]);
        if host.as_ref().err() != refused.as_ref() {
            return Err(format!("row {index}: the host says {host:?}, wanted {refused:?}"));
        }
    }
    // The same request twice has the same answer, whatever lies between.
    same(&answers[0], &answers[14])?;
    match run(&device, DRAWABLE, &rows, &[Case::new(&nan, 0)])?[0] {
        Err(Refused::Parameter { name: "min_p", .. }) => Ok(()),
        ref other => Err(format!("a min_p of NaN: {other:?}")),
    }
}

fn same(a: &SampleResult, b: &SampleResult) -> Result<(), String> {
    if a == b { Ok(()) } else { Err(format!("{a:?} and {b:?} differ")) }
}

/// Calls that do not fit the room, each with a word of its reason.
pub fn calls<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let call = |rows: usize, cols: usize, request: SampleRequest<'_>, requests: usize| {
        let mut room = device.sample_room(2, LEN, DRAWABLE)?;
        let mut logits = Tensor::exact_zeros(&device, rows, cols)?;
        device.choose(&mut room, &mut logits, &vec![request; requests]).map(|_| ())
    };
    let greedy =
        |next: NextToken<'static>| SampleRequest { wanted: Wanted::Next(next), logprobs: None };
    let plain = greedy(NextToken::GREEDY);
    let many = SampleRequest { logprobs: Some(21), ..plain };
    let unsorted = greedy(NextToken { seen: &[(3, 1), (3, 2)], ..NextToken::GREEDY });
    let short = greedy(NextToken { allowed: Some(&[1, 2]), ..NextToken::GREEDY });
    refused("[2, 999]", call(2, 999, plain, 2))?;
    refused("1 requests for 2 rows", call(2, LEN, plain, 1))?;
    refused("room for 2", call(3, LEN, plain, 3))?;
    refused("at most 20", call(1, LEN, many, 1))?;
    refused("ascend", call(1, LEN, unsorted, 1))?;
    refused("2 words, wanted 32", call(1, LEN, short, 1))?;
    refused("0 of them", room(&device, 1, 5, 0))?;
    refused("of 524288", room(&device, 1, 1 << 19, 5))?;
    refused("65536 rows", room(&device, 1 << 16, 5, 5))?;
    let mut rounded = Tensor::zeros(&device, 1, LEN).map_err(|error| error.to_string())?;
    let one = device.sample_room(1, LEN, LEN);
    let result = one.and_then(|mut room| device.choose(&mut room, &mut rounded, &[plain]));
    refused("not f32", result.map(|_| ()))?;
    call(0, LEN, plain, 0).map_err(|error| error.to_string())
}

fn room<D: Driver>(
    device: &Cuda<D>,
    rows_max: usize,
    vocab: usize,
    drawable: usize,
) -> Result<(), KernelError> {
    device.sample_room(rows_max, vocab, drawable).map(|_| ())
}

fn refused(word: &str, result: Result<(), KernelError>) -> Result<(), String> {
    match result {
        Err(error) if error.to_string().contains(word) => Ok(()),
        other => Err(format!("wanted a refusal with {word:?}, got {other:?}")),
    }
}
