//! A decode step of a large model: layers as the decoder runs them, with weights of noise, and each
//! kernel of theirs.
//!
//! A layer stands for all: its weights are many times what a cache holds, and so it is run again
//! and again. The logits and what ranks exchange are not in it.

use super::{Scale, attention::filled, batch, int4, noisy, with_noise};
use crate::{BF16, flat::no_turn};
use cuda::{Cuda, CudaConfig, Driver, WeightFormat};
use kernels::{
    BLOCK_TOKENS, Backend, Batch, Heads, KernelError, Rotation, StepSequence, Tensor, WeightPart,
};
use std::time::Duration;

/// Times that are taken of a step, and of each kernel; medians count.
const STEPS: usize = 5;
const KERNELS: usize = 3;

/// What a layer's matrices are, and which part of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// bf16, one rank's of four, cut so that the ranks' results are summed.
    Bf16OfFour,
    Fp8,
    Int4,
}

/// A model's sizes on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sized {
    pub model: &'static str,
    pub form: Form,
    hidden: usize,
    heads: Heads,
    intermediate: usize,
}

/// The median of `times`, and one more that is not counted: it finds algorithms and makes room.
fn median(
    times: usize,
    mut take: impl FnMut() -> Result<Duration, KernelError>,
) -> Result<f64, KernelError> {
    take()?;
    let mut taken = (0..times)
        .map(|_| take().map(|time| time.as_secs_f64()))
        .collect::<Result<Vec<f64>, _>>()?;
    taken.sort_by(f64::total_cmp);
    Ok(taken[times / 2])
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub of: Sized,
    pub sequences: usize,
    pub context: usize,
    /// Layers that are timed as one step.
    layers: usize,
}

/// What a step came to.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutcome {
    pub layers: usize,
    /// Of all layers, captured, with kernels that overlap: as steps run.
    pub seconds: f64,
    /// The same with each kernel behind the end of the one before.
    pub apart_seconds: f64,
    /// The same launched one by one.
    pub eager_seconds: f64,
    /// Of each kernel of a layer: its name, its own time when run again and again (small matrices
    /// then come out of the cache), and the bytes that it must read and write.
    pub kernels: Vec<(String, f64, f64)>,
}

/// Times work by the device's own clock.
pub type Timer<'a, D> = &'a dyn Fn(
    &Cuda<D>,
    &mut dyn FnMut() -> Result<(), KernelError>,
) -> Result<Duration, KernelError>;

/// Every step; those of one layer follow each other.
pub fn steps(scale: Scale) -> Vec<Step> {
    let (hidden, qwen1, qwen2) = scale.of((8192, 24576, 29568), (256, 256, 256));
    let (q, few, dim) = scale.of((64, 8, 128), (4, 2, 64));
    let models = [("Qwen-72B", q, qwen1), ("Qwen2.5-72B", few, qwen2)];
    let batches: &[usize] = scale.of(&[1, 8, 32, 128], &[1, 3]);
    let contexts: &[usize] = scale.of(&[1024, 8192], &[20]);
    let layers = scale.of(20, 2);
    let mut all = Vec::new();
    for (model, kv, intermediate) in models {
        for form in [Form::Bf16OfFour, Form::Fp8, Form::Int4] {
            let part = if form == Form::Bf16OfFour { scale.of(4, 2) } else { 1 };
            let heads = Heads { q: q / part, kv: kv / part, dim };
            let of = Sized { model, form, hidden, heads, intermediate: intermediate / part };
            all.extend(contexts.iter().flat_map(|&context| {
                batches.iter().map(move |&sequences| Step { of, sequences, context, layers })
            }));
        }
    }
    all
}

impl Step {
    pub fn name(&self) -> String {
        let form = match self.of.form {
            Form::Bf16OfFour => "bf16 of TP4",
            Form::Fp8 => "fp8",
            Form::Int4 => "int4",
        };
        format!("{} {form}, {} × {}", self.of.model, self.sequences, self.context)
    }

    /// Times it on a device made with [`Sized::config`], with weights of [`Layer::new`].
    ///
    /// # Errors
    /// `KernelError::Memory` where the caches do not fit; what the device refuses.
    pub fn measure<D: Driver>(
        &self,
        device: &mut Cuda<D>,
        layer: &Layer<D>,
        timer: Timer<'_, D>,
    ) -> Result<StepOutcome, KernelError> {
        let mut run = Running::new(device, self)?;
        device.set_overlap(true);
        let eager_seconds =
            median(STEPS, || timer(device, &mut || self.run(device, layer, &mut run, &Op::ALL)))?;
        let mut captured = |device: &Cuda<D>| {
            device.driver().begin_capture()?;
            let done = self.run(device, layer, &mut run, &Op::ALL);
            let graph = device.driver().end_capture()?;
            done?;
            median(STEPS, || timer(device, &mut || device.driver().replay(&graph)))
        };
        let seconds = captured(device)?;
        device.set_overlap(false);
        let apart_seconds = captured(device)?;
        device.set_overlap(true);
        let mut each = |op: Op| {
            let work = || timer(device, &mut || self.run(device, layer, &mut run, &[op]));
            let seconds = median(KERNELS, work)? / self.layers as f64;
            Ok((op.name().to_owned(), seconds, self.bytes(op)))
        };
        let kernels = Op::ALL.into_iter().map(&mut each).collect::<Result<_, KernelError>>()?;
        let layers = self.layers;
        Ok(StepOutcome { layers, seconds, apart_seconds, eager_seconds, kernels })
    }

    /// Launches `ops` of every layer.
    fn run<D: Driver>(
        &self,
        device: &Cuda<D>,
        layer: &Layer<D>,
        run: &mut Running<D>,
        ops: &[Op],
    ) -> Result<(), KernelError> {
        let all = (0..self.layers).flat_map(|_| ops);
        all.into_iter().try_for_each(|op| run.one(device, layer, *op))
    }

    /// Read and written by one op of a layer, as little as can be.
    fn bytes(&self, op: Op) -> f64 {
        let Sized { hidden, heads, intermediate, .. } = self.of;
        let (rows, attended) = (self.sequences, heads.q * heads.dim);
        let vectors = |cols: usize| 2 * rows * cols;
        let product = |n, k| self.of.weight_bytes((n, k)) + vectors(n + k);
        let bytes = match op {
            Op::NormBefore | Op::NormBehind => vectors(4 * hidden),
            Op::Qkv => product(heads.qkv_cols(), hidden),
            Op::Attention => {
                let cached = 2 * rows * self.context * heads.kv * heads.dim * 2;
                cached + vectors(heads.qkv_cols() + attended)
            }
            Op::Out => product(hidden, attended),
            Op::GateUp => product(2 * intermediate, hidden) - vectors(intermediate),
            Op::Down => product(hidden, intermediate),
        };
        bytes as f64
    }
}

impl StepOutcome {
    /// Read and written by the step.
    pub fn bytes(&self) -> f64 {
        self.layers as f64 * self.kernels.iter().map(|(.., bytes)| bytes).sum::<f64>()
    }
}

impl Sized {
    pub fn config(&self) -> CudaConfig {
        match self.form {
            Form::Fp8 => CudaConfig { weights: WeightFormat::Fp8, ..BF16 },
            Form::Bf16OfFour | Form::Int4 => BF16,
        }
    }

    fn weight_bytes(&self, (n, k): (usize, usize)) -> usize {
        match self.form {
            Form::Bf16OfFour => 2 * n * k,
            Form::Fp8 => n * k + 4 * n,
            Form::Int4 => int4::weight_bytes((n, k)),
        }
    }
}

/// What a layer launches, in the order of the decoder's.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Op {
    NormBefore,
    Qkv,
    Attention,
    Out,
    NormBehind,
    GateUp,
    Down,
}

impl Op {
    const ALL: [Self; 7] = [
        Self::NormBefore,
        Self::Qkv,
        Self::Attention,
        Self::Out,
        Self::NormBehind,
        Self::GateUp,
        Self::Down,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::NormBefore => "add, norm before attention",
            Self::Qkv => "qkv",
            Self::Attention => "rope, store, attention",
            Self::Out => "out",
            Self::NormBehind => "add, norm behind attention",
            Self::GateUp => "gate, up, silu",
            Self::Down => "down",
        }
    }
}

type Weight<D> = <Cuda<D> as Backend>::Weight;
type Upload<'a, D> = &'a dyn Fn(&[WeightPart<'_>]) -> Result<Weight<D>, KernelError>;

/// One layer's weights.
pub struct Layer<D: Driver> {
    qkv: Weight<D>,
    bias: Tensor<Cuda<D>>,
    out: Weight<D>,
    gate_up: Weight<D>,
    down: Weight<D>,
    norm: Tensor<Cuda<D>>,
}

impl<D: Driver> Layer<D> {
    /// # Errors
    /// What the device refuses.
    pub fn new(device: &Cuda<D>, of: &Sized) -> Result<Self, KernelError> {
        let Sized { hidden, heads, intermediate, form, .. } = *of;
        let made = |n, k, upload: Upload<'_, D>| match form {
            Form::Int4 => int4::weight((n, k), upload),
            Form::Bf16OfFour | Form::Fp8 => with_noise(n, k, upload),
        };
        let weight = |n, k| made(n, k, &|parts| device.weight(parts));
        Ok(Self {
            qkv: weight(heads.qkv_cols(), hidden)?,
            bias: noisy(device, 1, heads.qkv_cols())?,
            out: weight(hidden, heads.q * heads.dim)?,
            gate_up: made(2 * intermediate, hidden, &|parts| device.gate_up(parts))?,
            down: weight(hidden, intermediate)?,
            norm: noisy(device, 1, hidden)?,
        })
    }
}

/// A step's buffers.
struct Running<D: Driver> {
    heads: Heads,
    kv: <Cuda<D> as Backend>::Kv,
    batch: Batch<Cuda<D>>,
    cos_sin: Tensor<Cuda<D>>,
    hidden: Tensor<Cuda<D>>,
    delta: Tensor<Cuda<D>>,
    normed: Tensor<Cuda<D>>,
    qkv: Tensor<Cuda<D>>,
    attended: Tensor<Cuda<D>>,
    gate_up: Tensor<Cuda<D>>,
    gated: Tensor<Cuda<D>>,
}

impl<D: Driver> Running<D> {
    fn new(device: &Cuda<D>, step: &Step) -> Result<Self, KernelError> {
        let Step { of, sequences, context, .. } = *step;
        let Sized { heads, hidden, intermediate, .. } = of;
        let noisy = |cols| noisy(device, sequences, cols);
        let mut batch = batch(device, sequences, 1, context, heads)?;
        // As in every later step: no new blocks. One row of angles for all.
        let row = |table| StepSequence { table, start: context - 1, rows: 1, rope_start: 0 };
        let step = kernels::Step {
            sequences: (0..sequences).map(row).collect(),
            ids: vec![0; sequences],
            ..kernels::Step::default()
        };
        device.lay_out(&mut batch, &step)?;
        Ok(Self {
            heads,
            kv: filled(device, sequences * context.div_ceil(BLOCK_TOKENS), heads)?,
            batch,
            cos_sin: no_turn(device, heads.dim)?,
            hidden: noisy(hidden)?,
            delta: noisy(hidden)?,
            normed: noisy(hidden)?,
            qkv: noisy(heads.qkv_cols())?,
            attended: noisy(heads.q * heads.dim)?,
            gate_up: noisy(2 * intermediate)?,
            gated: noisy(intermediate)?,
        })
    }

    fn one(&mut self, device: &Cuda<D>, layer: &Layer<D>, op: Op) -> Result<(), KernelError> {
        const EPS: f32 = 1e-6;
        let s = self;
        match op {
            Op::NormBefore | Op::NormBehind => {
                device.add_rms_norm(&mut s.normed, &mut s.hidden, &s.delta, &layer.norm, EPS)
            }
            Op::Qkv => device.linear(&mut s.qkv, &s.normed, &layer.qkv, Some(&layer.bias)),
            Op::Attention => {
                let rotation = Rotation { norm: None, cos_sin: &s.cos_sin, heads: s.heads };
                let (out, kv, qkv) = (&mut s.attended, &mut s.kv, &mut s.qkv);
                device.rotate_and_attend(out, kv, qkv, &rotation, &s.batch, None)
            }
            Op::Out => device.linear(&mut s.delta, &s.attended, &layer.out, None),
            Op::GateUp => device.gated(&mut s.gated, &mut s.gate_up, &s.normed, &layer.gate_up),
            Op::Down => device.linear(&mut s.delta, &s.gated, &layer.down, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both have 72 billion weights, of which two tables of 1.25 are in no layer.
    #[test]
    fn eighty_layers_have_the_weights_of_the_models() {
        let weights = |model: &str, form: Form| {
            let steps = steps(Scale::Full);
            let step = steps.iter().find(|step| step.of.model == model && step.of.form == form);
            let step = Step { sequences: 0, ..*step.expect("a step") };
            80.0 * Op::ALL.into_iter().map(|op| step.bytes(op)).sum::<f64>() / 1e9
        };
        let near = |got: f64, wanted: f64| (got - wanted).abs() < 0.02 * wanted;
        for model in ["Qwen-72B", "Qwen2.5-72B"] {
            let (fp8, int4) = (weights(model, Form::Fp8), weights(model, Form::Int4));
            let of_four = weights(model, Form::Bf16OfFour);
            assert!(near(fp8, 70.0), "{model}: {fp8}");
            // Half a byte, and a 32nd for scales and zero points.
            assert!(near(int4, 70.0 * 17.0 / 32.0), "{model}: {int4}");
            assert!(near(of_four, 70.0 / 2.0), "{model}: {of_four}");
        }
    }
}
