//! Choosing tokens as a step sees it: requests go up, logits are read, answers come down.

use super::{Bar, Bench, Prepare, Scale, Work};
use crate::{BF16, sampling::normal_row};
use cuda::{Cuda, Driver};
use kernels::{
    KernelError, Tensor,
    sampling::{NextToken, SampleRequest, Wanted},
};

/// Tokens that penalties look at.
const SEEN: usize = 256;

/// How rows of a bench are sampled.
#[derive(Clone, Copy)]
struct Kind {
    op: &'static str,
    next: NextToken<'static>,
    penalties: bool,
}

pub fn benches<D: Driver>(scale: Scale) -> Vec<Bench<D>> {
    let (rows, vocab) = scale.of((64, 152_064), (3, 1500));
    let top_p = NextToken { temperature: 0.7, top_p: 0.8, ..NextToken::GREEDY };
    let every = NextToken {
        top_k: 20,
        min_p: 0.02,
        repetition_penalty: 1.05,
        presence_penalty: 0.5,
        frequency_penalty: 0.1,
        ..top_p
    };
    let kinds = [
        Kind { op: "sample, greedy", next: NextToken::GREEDY, penalties: false },
        Kind { op: "sample, top-p", next: top_p, penalties: false },
        Kind { op: "sample, top-k, top-p, min-p, penalties", next: every, penalties: true },
    ];
    let shapes = [rows, 1].map(|rows| (rows, vocab));
    let kinds = kinds.into_iter().flat_map(|kind| shapes.map(|shape| (kind, shape)));
    kinds.map(|(kind, shape)| bench(kind, shape)).collect()
}

fn bench<D: Driver>(kind: Kind, (rows, vocab): (usize, usize)) -> Bench<D> {
    Bench {
        op: kind.op,
        shape: format!("{rows} × {vocab}"),
        config: BF16,
        // Logits once, which is the least.
        work: Work::Bytes((4 * rows * vocab) as f64),
        bar: if rows > 1 { Bar::Microseconds(100.0) } else { Bar::None },
        peer: None,
        prepare: prepared(kind, (rows, vocab)),
        baseline: None,
    }
}

fn prepared<D: Driver>(kind: Kind, (rows, vocab): (usize, usize)) -> Prepare<D> {
    Box::new(move |device| {
        let values: Vec<f32> = (0..rows).flat_map(|row| normal_row(vocab, row as u64)).collect();
        let mut logits = Tensor::exact_from_host(device, vocab, &values)?;
        let mut room = device.sample_room(rows, vocab, vocab)?;
        let len = if kind.penalties { SEEN } else { 0 };
        // Spread over the vocabulary; every third only in the prompt.
        let seen: Vec<_> = (0..len).map(|i| ((i * vocab / len) as u32, i as u32 % 3)).collect();
        let mut position = 0;
        Ok(Box::new(move |device: &Cuda<D>| {
            position += 1;
            let request = |row: usize| {
                let next = NextToken { seed: row as u64, position, seen: &seen, ..kind.next };
                SampleRequest { wanted: Wanted::Next(next), logprobs: None }
            };
            let requests: Vec<_> = (0..rows).map(request).collect();
            let answers = device.choose(&mut room, &mut logits, &requests)?;
            let refused = answers.into_iter().find_map(Result::err);
            refused.map_or(Ok(()), |refused| Err(KernelError::Device(refused.to_string())))
        }))
    })
}
