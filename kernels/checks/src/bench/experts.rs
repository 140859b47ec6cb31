//! Products by expert, of a model with many small ones: silu(gate) · up, and down.

use super::{Bar, Bench, Prepare, Scale, Work, noisy};
use crate::{BF16, linear::FP8};
use cuda::{Cuda, CudaConfig, Driver};
use kernels::{
    Backend, ExpertRows, KernelError, PartShape, Random, RandomFormat, Routes, Routing, Stored,
    Tensor, WeightPart,
};

/// Experts of a layer, and widths.
#[derive(Clone, Copy)]
struct Layer {
    routing: Routing,
    hidden: usize,
    width: usize,
}

/// What the matrices are kept in.
#[derive(Clone, Copy)]
struct Form {
    op: &'static str,
    config: CudaConfig,
    format: RandomFormat,
    /// Bits of a number, with what scales it.
    bits: f64,
}

const FORMS: [Form; 3] = [
    Form { op: "experts in bf16", config: BF16, format: RandomFormat::Bf16, bits: 16.0 },
    Form { op: "experts in e4m3", config: FP8, format: RandomFormat::Bf16, bits: 8.0 },
    Form {
        op: "experts in int4",
        config: BF16,
        format: RandomFormat::Int4 { group: 128 },
        bits: 4.25,
    },
];

pub fn benches<D: Driver>(scale: Scale) -> Vec<Bench<D>> {
    let routing =
        |experts, per_token| Routing { experts, per_token, normalise: true, shared: false };
    // Qwen3-30B-A3B's.
    let layer = scale.of(
        Layer { routing: routing(128, 8), hidden: 2048, width: 768 },
        Layer { routing: routing(4, 2), hidden: 128, width: 128 },
    );
    let tokens: &[usize] = scale.of(&[1, 8, 64, 1024], &[3]);
    let each = FORMS.into_iter().flat_map(|form| tokens.iter().map(move |&m| (form, m)));
    each.flat_map(|(form, m)| [true, false].map(|is_first| product(layer, form, m, is_first)))
        .collect()
}

/// The first product of a layer, or its second, of m tokens that are spread evenly.
fn product<D: Driver>(layer: Layer, form: Form, m: usize, is_first: bool) -> Bench<D> {
    let Layer { routing: Routing { experts, per_token, .. }, hidden, width } = layer;
    let (n, k) = if is_first { (2 * width, hidden) } else { (hidden, width) };
    let chosen = (m * per_token).min(experts);
    let bytes = (chosen * n * k) as f64 * form.bits / 8.0;
    Bench {
        op: form.op,
        shape: format!("{m} × {per_token} of {experts} [{n}, {k}]"),
        config: form.config,
        work: match m {
            0..512 => Work::Bytes(bytes),
            _ => Work::Flops(2.0 * (m * per_token * n) as f64 * k as f64),
        },
        bar: Bar::None,
        peer: None,
        prepare: prepared(layer, form, m, is_first),
        baseline: None,
    }
}

fn prepared<D: Driver>(layer: Layer, form: Form, m: usize, is_first: bool) -> Prepare<D> {
    let Layer { routing, hidden, width } = layer;
    Box::new(move |device| {
        let (rows, cols) = if is_first { (2 * width, hidden) } else { (hidden, width) };
        let mut experts = match is_first {
            true => device.expert_gate_ups(routing.experts, &[shape(form, rows, cols)])?,
            false => device.experts(routing.experts, &[shape(form, rows, cols)])?,
        };
        for expert in 0..routing.experts {
            device.push_expert(&mut experts, &[part(form, expert as u64, rows, cols)])?;
        }
        let routes = routed(device, routing, m)?;
        let pairs = m * routing.per_token;
        let x = noisy(device, if is_first { m } else { pairs }, cols)?;
        let mut out = Tensor::zeros(device, pairs, if is_first { width } else { hidden })?;
        let mut room = Tensor::zeros(device, pairs, rows)?;
        Ok(Box::new(move |device: &Cuda<D>| match is_first {
            true => device.expert_gated(&mut out, &mut room, &x, &experts, &routes),
            false => device.expert_linear(&mut out, &x, ExpertRows::Pairs, &experts, &routes),
        }))
    })
}

fn part(form: Form, seed: u64, rows: usize, cols: usize) -> WeightPart<'static> {
    let random = Random { seed, first_row: 0, first_col: 0, format: form.format };
    WeightPart { rows, cols, stored: Stored::Random(random) }
}

fn shape(form: Form, rows: usize, cols: usize) -> PartShape {
    part(form, 0, rows, cols).shape()
}

/// Each token's experts are the ones behind the last token's.
fn routed<D: Driver>(
    device: &Cuda<D>,
    routing: Routing,
    tokens: usize,
) -> Result<Routes<Cuda<D>>, KernelError> {
    let Routing { experts, per_token, .. } = routing;
    let logit = |at: usize| {
        let (token, expert) = (at / experts, at % experts);
        let first = token * per_token % experts;
        f32::from((expert + experts - first) % experts < per_token)
    };
    let logits: Vec<f32> = (0..tokens * experts).map(logit).collect();
    let mut routes = Routes::new(device, routing, tokens)?;
    device.route(&mut routes, &Tensor::exact_from_host(device, experts, &logits)?)?;
    Ok(routes)
}
