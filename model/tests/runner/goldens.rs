//! The forward pass against the reference implementations, on every family and every rank count.

use crate::{
    cases::{NAMES, continuations, prompts},
    common::{Driven, GREEDY, Group, OPTIONS, exact, open},
};
use engine::plan::Want;
use kernels::{Backend, plain::Plain};
use model::Checkpoint;
use std::sync::Arc;

const LOGIT_TOLERANCE: f32 = 1e-3;
/// Below this distance of the two best logits, either may win.
const MARGIN: f64 = 0.002;

/// Every rank count up to 3 that the model can be split over.
fn world_sizes(checkpoint: &Checkpoint) -> Vec<usize> {
    (1..=3).filter(|&world_size| checkpoint.shard(0, world_size).is_ok()).collect()
}

fn check<B: Backend>(device: fn() -> B) {
    for name in NAMES {
        let checkpoint = Arc::new(open(name));
        let world_sizes = world_sizes(&checkpoint);
        assert!(world_sizes.contains(&2), "{name} cannot be split");
        for world_size in world_sizes {
            let mut group = Group::load(&checkpoint, world_size, OPTIONS, device);
            let case = format!("{name} on {world_size} ranks");
            let mut id = 0;
            for chunk in [256, 7] {
                check_logits(&mut group, name, chunk, &mut id, &case);
            }
            check_continuations(&mut group, name, &mut id, &case);
        }
    }
}

/// Logits at every position of every prompt, `chunk` tokens at a time.
fn check_logits<B: Backend>(
    group: &mut Group<B>,
    name: &str,
    chunk: usize,
    id: &mut u64,
    case: &str,
) {
    for prompt in prompts(name) {
        *id += 1;
        // Blocks in no order, so that nothing depends on one.
        let blocks = (0..16).map(|i| (i * 7 + 3) % 64).collect();
        let mut sequence = Driven::new(*id, &prompt.ids, GREEDY, blocks);
        let mut logits = Vec::new();
        while sequence.remaining() > 0 {
            let output = group.step(vec![sequence.chunk(chunk, Want::Logits)]).unwrap();
            logits.extend(output.logits.into_iter().flat_map(|(_, rows)| rows));
        }
        assert_eq!(logits.len(), prompt.logits.len(), "{case}");
        let off = logits.iter().zip(&prompt.logits).map(|(a, b)| (a - b).abs());
        let worst = off.fold(0.0f32, |worst, off| if off > worst { off } else { worst });
        let finite = logits.iter().all(|logit| logit.is_finite());
        assert!(
            finite && worst <= LOGIT_TOLERANCE,
            "{case}, prompt of {}, chunks of {chunk}: logits are {worst} off",
            prompt.ids.len()
        );
    }
}

/// All greedy continuations side by side: prompts in chunks, then token by token.
fn check_continuations<B: Backend>(group: &mut Group<B>, name: &str, id: &mut u64, case: &str) {
    let expected = continuations(name);
    let mut sequences = Vec::new();
    for (index, continuation) in expected.iter().enumerate() {
        *id += 1;
        let blocks = (0..12).map(|i| index as u32 + 5 * i).collect();
        sequences.push(Driven::new(*id, &continuation.prompt, GREEDY, blocks));
    }
    let answer = |s: &Driven| s.tokens.len() - s.prompt_len;
    while sequences.iter().any(|s| answer(s) < 32) {
        let unfinished = sequences.iter_mut().filter(|s| s.tokens.len() - s.prompt_len < 32);
        let chunks = unfinished.map(|s| s.chunk(16, Want::Sample)).collect();
        for (id, sampled) in group.step(chunks).unwrap().sampled {
            let sequence = sequences.iter_mut().find(|s| s.id == id).unwrap();
            sequence.tokens.push(sampled.token);
        }
    }
    for (sequence, expected) in sequences.iter().zip(&expected) {
        let got = &sequence.tokens[sequence.prompt_len..];
        let differs = (0..32).find(|&i| got[i] != expected.tokens[i]);
        if let Some(at) = differs {
            let margin = expected.margins[at];
            assert!(
                margin <= MARGIN,
                "{case}, prompt of {}: token {at} is {}, not {}, margin {margin}",
                sequence.prompt_len,
                got[at],
                expected.tokens[at]
            );
        }
    }
}

#[test]
fn the_plain_backend_agrees_with_the_reference_implementations() {
    check(|| Plain);
}

#[test]
fn the_cpu_backend_agrees_with_the_reference_implementations() {
    check(exact);
}
