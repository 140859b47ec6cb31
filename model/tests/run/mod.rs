//! Runs one prompt through a checkpoint on the CPU.

use collective::{Staged, Threads};
use cpu::{Cpu, CpuConfig, Isa, Precision};
use engine::plan::{Admission, Chunk, SamplingParams, StepPlan, Tokens, Want};
use model::{Checkpoint, Runner, RunnerOptions};

/// Every logit of a prompt of up to 32 tokens.
pub fn logits(
    checkpoint: &Checkpoint,
    ids: &[u32],
    precision: Precision,
    world_size: usize,
) -> Vec<f32> {
    let admission =
        Admission { params: SamplingParams::GREEDY, tokens: ids.into(), prompt_len: ids.len() };
    let chunk = Chunk {
        sequence: 1,
        start: 0,
        tokens: Tokens::Known(ids.into()),
        next: None,
        blocks: vec![1, 0],
        want: Want::Logits,
        admission: Some(Box::new(admission)),
    };
    let plan = StepPlan { chunks: vec![chunk], ..StepPlan::default() };
    let options =
        RunnerOptions { blocks: 2, step_tokens_max: 32, sequences_max: 1, context_max: 32 };
    let config = CpuConfig { threads: 1, precision, isa: Isa::detect() };
    let run = &|rank| {
        let device = Cpu::new(config).unwrap();
        let rank = Staged::new(rank);
        let mut runner = Runner::load(device, rank, checkpoint, options, &mut |_| {}).unwrap();
        runner.step(&plan).unwrap().logits
    };
    let mut outputs: Vec<_> = std::thread::scope(|scope| {
        let start = |rank| scope.spawn(move || run(rank));
        let ranks: Vec<_> = Threads::group(world_size).into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    outputs[0].swap_remove(0).1
}
