//! What a rank is said to take of a card is what a whole runner takes.

#[path = "../../../../kernels/cuda/tests/common/counting.rs"]
mod counting;

use std::{path::Path, thread, time::Duration};

use collective::{Cards, CardsConfig, Threads};
use counting::Counting;
use cuda::{Cuda, CudaConfig, Driver, GEMM_WORKSPACE_BYTES, KvFormat, PeerConfig, WeightFormat};
use engine::{
    Driven,
    plan::{BLOCK_TOKENS, SamplingParams, StepPlan, Want},
};
use kernels::Join;
use model::{Checkpoint, Numbers, Runner, RunnerOptions};

use super::{cost, scratch};

/// Two splits of attention for each sequence at its end, and a token of each in a step.
const CONTEXT: usize = 520;
const OPTIONS: RunnerOptions = RunnerOptions {
    blocks: 64 * CONTEXT.div_ceil(BLOCK_TOKENS),
    step_tokens_max: 64,
    sequences_max: 64,
    context_max: CONTEXT,
};

/// Runs what wants the most of every room that grows: long prompts in whole steps, then all
/// sequences at the end of their context, each with every token seen.
fn run(runner: &mut Runner<Cuda<Counting>, Cards<Counting, Threads>>, vocab: usize) {
    let params = SamplingParams { repetition_penalty: 1.5, ..SamplingParams::GREEDY };
    let blocks_each = OPTIONS.blocks / OPTIONS.sequences_max;
    let tokens: Vec<u32> = (0..CONTEXT).map(|at| (at % vocab) as u32).collect();
    let driven = |id: usize| {
        let blocks = id * blocks_each..(id + 1) * blocks_each;
        let blocks = blocks.map(|block| block as u32).collect();
        Driven::new(id as u64, &tokens, params.clone(), blocks)
    };
    let mut sequences: Vec<Driven> = (0..OPTIONS.sequences_max).map(driven).collect();
    let mut number = 0;
    let mut step = |chunks| {
        runner.step(&StepPlan { number, chunks, released: Vec::new() }).expect("a step");
        number += 1;
    };
    for sequence in &mut sequences {
        while sequence.remaining() > 1 {
            let rows = OPTIONS.step_tokens_max.min(sequence.remaining() - 1);
            step(vec![sequence.chunk(rows, Want::Nothing)]);
        }
    }
    step(sequences.iter_mut().map(|sequence| sequence.chunk(1, Want::Sample)).collect());
}

/// Checks one rank after its steps.
fn check(checkpoint: &Checkpoint, cuda: CudaConfig, data: Threads) {
    use collective::HostCollective;
    let (rank, ranks) = (data.rank(), data.world_size());
    let config = checkpoint.config();
    let shard = checkpoint.shard(rank, ranks).expect("ranks").joined_by(Join::Sum, config);
    let counting = Counting::new();
    let products = counting.facts().fp8_products();
    let cost = cost(cuda, products, checkpoint, &shard, OPTIONS.step_tokens_max).expect("sizes");
    let device = Cuda::new(counting.clone(), cuda);
    let peers = PeerConfig::new(ranks, Duration::ZERO);
    let link = Cards::new(&device, data, &CardsConfig::peers(peers)).expect("regions");
    let runner = Runner::load(device, link, checkpoint, OPTIONS, &mut |_| {});
    let mut runner = runner.expect("a runner");
    run(&mut runner, config.vocab);
    let reckoned = cost.weights
        + cost.block * OPTIONS.blocks as u64
        + scratch(cuda, config, &shard, &cost, &OPTIONS)
        // No product is computed here.
        - GEMM_WORKSPACE_BYTES as u64;
    let what = format!("{} {cuda:?}, rank {rank} of {ranks}", checkpoint.name());
    assert_eq!(reckoned, counting.held() as u64, "{what}");
}

#[test]
fn a_whole_runner_holds_the_bytes_that_were_reckoned() {
    let bf16 = CudaConfig::default();
    let fp8 = CudaConfig { weights: WeightFormat::Fp8, kv_format: KvFormat::Fp8, ..bf16 };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public");
    for (name, cuda, ranks) in [
        ("llama_smollm2", bf16, 1),
        ("qwen2_gqa2_hd128", fp8, 1),
        ("qwen2_mha_hd64", bf16, 2),
        ("qwen1_ntk_logn", fp8, 2),
        ("qwen2_gptq_int4", bf16, 1),
        ("qwen2_awq_int4", fp8, 2),
        ("qwen2_moe", bf16, 2),
        ("qwen3_moe", fp8, 1),
        ("qwen3_gqa4_hd128_tied", bf16, 1),
    ] {
        on_ranks(&Checkpoint::open(&golden.join(name)).expect(name), cuda, ranks);
    }
    for (name, ranks) in [("qwen2_moe", 2), ("qwen3_moe", 1)] {
        let int4 = Checkpoint::random(&golden.join(name), Numbers::INT4, 1).expect(name);
        on_ranks(&int4, fp8, ranks);
    }
}

fn on_ranks(checkpoint: &Checkpoint, cuda: CudaConfig, ranks: usize) {
    thread::scope(|scope| {
        for data in Threads::group(ranks) {
            scope.spawn(|| check(checkpoint, cuda, data));
        }
    });
}
