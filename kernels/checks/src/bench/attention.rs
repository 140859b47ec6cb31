//! Decode attention, bound by the cache's bytes; prefill attention, bound by arithmetic.

use super::{Bar, Bench, Peer, Prepare, Scale, Work, batch, noisy};
use crate::{BF16, flat::no_turn};
use cuda::{Cuda, CudaConfig, Driver, Element, KvFormat, PrefillKernel};
use kernels::{BLOCK_TOKENS, Backend, Heads, KernelError, Rotation, Tensor};

const QWEN_72B: Heads = Heads { q: 64, kv: 8, dim: 128 };
const QWEN_7B: Heads = Heads { q: 28, kv: 4, dim: 128 };
const QWEN_HALF_B: Heads = Heads { q: 14, kv: 2, dim: 64 };
/// Original Qwen has a key head for each query head.
const QWEN1_7B: Heads = Heads { q: 32, kv: 32, dim: 128 };

/// Rows that fill the cache at a time.
const FILL_ROWS: usize = 8192;

pub fn benches<D: Driver>(scale: Scale) -> Vec<Bench<D>> {
    let decode: &[(usize, usize, Heads)] = scale.of(
        &[
            (64, 4096, QWEN_72B),
            (16, 4096, QWEN_72B),
            (16, 32768, QWEN_72B),
            (1, 32768, QWEN_72B),
            (64, 4096, QWEN_7B),
            (64, 8192, QWEN_HALF_B),
            (16, 8192, QWEN1_7B),
        ],
        &[(2, 33, QWEN_HALF_B)],
    );
    let prefill: &[(usize, usize, usize, Heads)] = scale.of(
        &[
            (1, 8192, 8192, QWEN_72B),
            (4, 2048, 2048, QWEN_72B),
            (1, 2048, 32768, QWEN_72B),
            (1, 16, 32768, QWEN_72B),
            (1, 128, 32768, QWEN_72B),
            (1, 32, 8192, QWEN_7B),
            (1, 8192, 8192, QWEN_7B),
            (1, 8192, 8192, QWEN_HALF_B),
        ],
        &[(1, 18, 20, QWEN_HALF_B)],
    );
    let mut all = Vec::new();
    for format in [KvFormat::Bf16, KvFormat::Fp8] {
        all.extend(
            decode.iter().map(|&(batch, context, heads)| decoding((batch, context), heads, format)),
        );
    }
    for format in [KvFormat::Bf16, KvFormat::Fp8] {
        for kernel in [PrefillKernel::Mma, PrefillKernel::Fastest] {
            all.extend(prefill.iter().map(|&(batch, rows, context, heads)| {
                prefilling((batch, rows, context), heads, (kernel, format))
            }));
        }
    }
    all
}

fn named(heads: Heads) -> String {
    format!("{}/{} heads of {}", heads.q, heads.kv, heads.dim)
}

fn decoding<D: Driver>(
    (sequences, context): (usize, usize),
    heads: Heads,
    kv_format: KvFormat,
) -> Bench<D> {
    let cached = 2 * sequences * context * heads.kv * heads.dim * kv_format.element_bytes();
    let rows = 2 * sequences * heads.q * heads.dim * Element::Bf16.bytes();
    // Fewer sequences leave multiprocessors idle; the bar is for a server at work.
    let bar = if sequences >= 16 { Bar::OfCopy(0.80) } else { Bar::None };
    let bf16 = kv_format == KvFormat::Bf16;
    Bench {
        op: if bf16 { "attention_decode" } else { "attention_decode, fp8 cache" },
        shape: format!("{sequences} × {context}, {}", named(heads)),
        config: CudaConfig { kv_format, ..BF16 },
        work: Work::Bytes((cached + rows) as f64),
        bar,
        // PyTorch's attention has no fp8 caches.
        peer: bf16.then_some(Peer::Attention { batch: sequences, rows: 1, context, heads }),
        prepare: prepared((sequences, 1, context), heads),
        baseline: None,
    }
}

fn prefilling<D: Driver>(
    (sequences, rows, context): (usize, usize, usize),
    heads: Heads,
    (prefill, kv_format): (PrefillKernel, KvFormat),
) -> Bench<D> {
    // Row i sees the prefix, itself, and what came before.
    let seen = rows * (context - rows) + rows * (rows + 1) / 2;
    let flops = 4.0 * (sequences * seen) as f64 * (heads.q * heads.dim) as f64;
    let bf16 = kv_format == KvFormat::Bf16;
    let (op, least) = match (prefill, kv_format) {
        (PrefillKernel::Mma, KvFormat::Bf16) => ("attention_prefill, mma.sync", 330.0),
        (PrefillKernel::Mma, KvFormat::Fp8) => ("attention_prefill, mma.sync, fp8 cache", 250.0),
        (_, KvFormat::Bf16) => ("attention_prefill", 550.0),
        (_, KvFormat::Fp8) => ("attention_prefill, fp8 cache", 400.0),
    };
    let long = heads.dim == 128 && rows >= 8192;
    Bench {
        op,
        shape: format!("{sequences} × {rows} of {context}, {}", named(heads)),
        config: CudaConfig { prefill, kv_format, ..BF16 },
        work: Work::Flops(flops),
        bar: if long { Bar::Tflops(least) } else { Bar::None },
        // PyTorch's attention has no fp8 caches.
        peer: bf16.then_some(Peer::Attention { batch: sequences, rows, context, heads }),
        prepare: prepared((sequences, rows, context), heads),
        baseline: None,
    }
}

/// A cache full of noise, and rows to attend to it.
fn prepared<D: Driver>(
    (sequences, rows, context): (usize, usize, usize),
    heads: Heads,
) -> Prepare<D> {
    Box::new(move |device| {
        let blocks = sequences * context.div_ceil(BLOCK_TOKENS);
        let kv = filled(device, blocks, heads)?;
        let qkv = noisy(device, sequences * rows, heads.qkv_cols())?;
        let batch = batch(device, sequences, rows, context, heads)?;
        let mut out = Tensor::zeros(device, sequences * rows, heads.q * heads.dim)?;
        Ok(Box::new(move |device: &Cuda<D>| {
            device.attention(&mut out, &qkv, &kv, &batch, heads, None)
        }))
    })
}

/// A cache of so many blocks, all of noise.
pub(super) fn filled<D: Driver>(
    device: &Cuda<D>,
    blocks: usize,
    heads: Heads,
) -> Result<<Cuda<D> as Backend>::Kv, KernelError> {
    let mut kv = device.kv(blocks, heads)?;
    let slots = blocks * BLOCK_TOKENS;
    let mut noise = noisy(device, slots.min(FILL_ROWS), heads.qkv_cols())?;
    let mut piece = batch(device, 1, noise.rows, noise.rows, heads)?;
    (piece.rope_rows_end, piece.blocks_end) = (1, blocks);
    let cos_sin = no_turn(device, heads.dim)?;
    device.write_ints(&mut piece.rope_rows, &vec![0; noise.rows])?;
    let rotation = Rotation { norm: None, cos_sin: &cos_sin, heads };
    for first in (0..slots).step_by(FILL_ROWS) {
        noise.rows = FILL_ROWS.min(slots - first);
        piece.tokens = noise.rows;
        let places: Vec<i32> = (first..first + noise.rows).map(|slot| slot as i32).collect();
        device.write_ints(&mut piece.slots, &places)?;
        device.rotate_and_store(&mut kv, &mut noise, &rotation, &piece)?;
    }
    Ok(kv)
}
