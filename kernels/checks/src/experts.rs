//! route, expert_linear, combine: mixtures of experts.

mod formats;

use crate::flat::{refused, text, unwritten, written};
use crate::{BF16, Check, Device, Tolerance, compare, noise, rounded};
use cuda::{Cuda, Driver};
use kernels::{
    Backend, ExpertRows, Format, KernelError, PartShape, Routes, Routing, Tensor, WeightPart,
    plain::Plain,
};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    let mut checks = vec![
        Check { name: "experts: chosen and multiplied", run: shapes },
        Check { name: "experts: logits that are equal, infinite and no numbers", run: odd_logits },
        Check { name: "experts: a token alone and among others", run: batches },
        Check { name: "experts: what is refused", run: refusals },
    ];
    checks.extend(formats::checks());
    checks
}

/// A mixture of experts, each a product and another behind it.
struct Mixture {
    routing: Routing,
    hidden: usize,
    width: usize,
    /// [E, I, H] and [E, H, I].
    up: Vec<f32>,
    down: Vec<f32>,
}

/// What a step of tokens gives.
struct Given {
    weights: Vec<f32>,
    /// [T k, I] by place.
    inner: Vec<f32>,
    /// [T, H]
    out: Vec<f32>,
}

impl Mixture {
    fn new(routing: Routing, hidden: usize, width: usize) -> Self {
        let len = routing.experts * hidden * width;
        let scaled = |seed, cols: usize| -> Vec<f32> {
            let size = (cols as f32).sqrt().recip();
            rounded(&noise(seed, len).iter().map(|v| v * size).collect::<Vec<_>>())
        };
        Self { routing, hidden, width, up: scaled(21, hidden), down: scaled(22, width) }
    }

    fn stack<B: Backend>(
        &self,
        device: &B,
        values: &[f32],
        [n, k]: [usize; 2],
    ) -> Result<B::Experts, KernelError> {
        let mut experts = device.experts(self.routing.experts, &[PartShape::numbers(n, k)])?;
        for matrix in values.chunks_exact(n * k) {
            let data: Vec<u8> = matrix.iter().flat_map(|v| v.to_le_bytes()).collect();
            device.push_expert(&mut experts, &[WeightPart::plain(Format::F32, n, k, data)])?;
        }
        Ok(experts)
    }

    /// `x` [T, H], `logits` [T, E (+ 1)] and the shared expert's result [T, H].
    fn run<B: Backend>(
        &self,
        device: &B,
        x: &[f32],
        logits: &[f32],
        shared: &[f32],
    ) -> Result<Given, String> {
        let tokens = x.len() / self.hidden;
        let run = || {
            let up = self.stack(device, &self.up, [self.width, self.hidden])?;
            let down = self.stack(device, &self.down, [self.hidden, self.width])?;
            let mut routes = Routes::new(device, self.routing, tokens)?;
            let logits = Tensor::exact_from_host(device, self.routing.logits(), logits)?;
            device.route(&mut routes, &logits)?;
            let x = Tensor::from_host(device, self.hidden, x)?;
            let mut inner = unwritten(device, routes.pairs(), self.width)?;
            device.expert_linear(&mut inner, &x, ExpertRows::Tokens, &up, &routes)?;
            let mut each = unwritten(device, routes.pairs(), self.hidden)?;
            device.expert_linear(&mut each, &inner, ExpertRows::Pairs, &down, &routes)?;
            let shared = Tensor::from_host(device, self.hidden, shared)?;
            let mut out = unwritten(device, tokens, self.hidden)?;
            let shared = self.routing.shared.then_some(&shared);
            device.combine(&mut out, &each, shared, &routes)?;
            let mut weights = vec![0.0; tokens * self.routing.weights()];
            device.read_floats(&mut weights, &routes.weights.data)?;
            Ok((weights, inner, each, out))
        };
        let (weights, inner, each, out) = run().map_err(text)?;
        written(device, &each)?;
        Ok(Given { weights, inner: written(device, &inner)?, out: written(device, &out)? })
    }

    /// The device against the oracle.
    fn agree<D: Driver>(
        &self,
        device: &Cuda<D>,
        tokens: usize,
        logits: &[f32],
    ) -> Result<(), String> {
        let (x, shared) = self.inputs(tokens);
        let what = format!("{:?}, {tokens} tokens of {}", self.routing, self.hidden);
        let got = self.run(device, &x, logits, &shared).map_err(|e| format!("{what}: {e}"))?;
        let wanted = self.run(&Plain, &x, logits, &shared)?;
        let near = Tolerance::Absolute(2e-6);
        compare(&format!("{what}, weights"), &got.weights, &wanted.weights, near)?;
        let one = Tolerance::UlpsOr(1, 2e-5);
        compare(&format!("{what}, first products"), &got.inner, &wanted.inner, one)?;
        // The second products take rounded results of the first ones.
        compare(&what, &got.out, &wanted.out, Tolerance::UlpsOr(2, 6e-3))
    }

    fn inputs(&self, tokens: usize) -> (Vec<f32>, Vec<f32>) {
        let len = tokens * self.hidden;
        (rounded(&noise(23, len)), rounded(&noise(24, len)))
    }

    fn logits(&self, tokens: usize) -> Vec<f32> {
        let logits = noise(25, tokens * self.routing.logits());
        logits.iter().map(|v| v * 4.0).collect()
    }
}

fn routing(experts: usize, per_token: usize) -> Routing {
    let odd = experts % 2 == 1;
    Routing { experts, per_token, normalise: odd, shared: per_token.is_multiple_of(2) }
}

/// About the ends of warps, tiles and stages: experts, experts of a token, tokens, columns.
fn shapes<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for (experts, per_token, tokens, hidden, width) in [
        (1, 1, 1, 8, 8),
        (1, 1, 40, 64, 136),
        (2, 2, 0, 64, 64),
        (3, 2, 17, 72, 8),
        (8, 2, 5, 128, 48),
        (31, 3, 9, 16, 24),
        (33, 4, 70, 200, 56),
        (60, 4, 3, 256, 16),
        (129, 8, 30, 24, 40),
        (64, 32, 3, 8, 16),
        (2, 1, 150, 136, 264),
    ] {
        let mixture = Mixture::new(routing(experts, per_token), hidden, width);
        mixture.agree(&device, tokens, &mixture.logits(tokens))?;
    }
    Ok(())
}

fn odd_logits<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for (experts, per_token) in [(8, 2), (40, 5), (7, 7)] {
        let mixture = Mixture::new(routing(experts, per_token), 32, 16);
        let width = mixture.routing.logits();
        let rows: [&dyn Fn(usize) -> f32; 6] = [
            // Of equals, the first.
            &|_| 0.5,
            &|e| [1.0, 2.0, 2.0][e % 3],
            &|e| if e == 6 { 80.0 } else { -80.0 },
            &|e| if e < 2 { -1.0 } else { f32::NEG_INFINITY },
            &|e| -1000.0 - e as f32,
            &|e| [-0.0, 0.0][e % 2],
        ];
        let logits: Vec<f32> = rows.iter().flat_map(|row| (0..width).map(row)).collect();
        mixture.agree(&device, rows.len(), &logits)?;
        // No numbers: weights mean nothing, and nothing outside is read or written.
        let (x, shared) = mixture.inputs(3);
        let logits: Vec<f32> = (0..3 * width).map(|at| [f32::NAN, 1.0][at % 2]).collect();
        mixture.run(&device, &x, &logits, &shared)?;
    }
    Ok(())
}

/// Enough tokens for tiles of many places, against each of them alone and a few together.
fn batches<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let mixture = Mixture::new(routing(4, 2), 72, 24);
    let tokens = 100;
    let ((x, shared), logits) = (mixture.inputs(tokens), mixture.logits(tokens));
    let all = mixture.run(&device, &x, &logits, &shared)?.out;
    for some in [0..1, 99..100, 3..5, 40..77] {
        let cut = |values: &[f32]| {
            let cols = values.len() / tokens;
            values[some.start * cols..some.end * cols].to_vec()
        };
        let got = mixture.run(&device, &cut(&x), &cut(&logits), &cut(&shared))?.out;
        let off = got.iter().zip(cut(&all)).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        if off > 0 {
            return Err(format!("tokens {some:?}: {off} numbers differ from those among others"));
        }
    }
    Ok(())
}

fn refusals<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let mixture = Mixture::new(routing(2, 2), 16, 8);
    let routed = |routing: Routing, exact: bool| -> Result<(), KernelError> {
        let mut routes = Routes::new(&device, routing, 1)?;
        let logits = vec![0.0; routing.logits()];
        let logits = match exact {
            true => Tensor::exact_from_host(&device, routing.logits(), &logits)?,
            false => Tensor::from_host(&device, routing.logits(), &logits)?,
        };
        device.route(&mut routes, &logits)
    };
    refused("3 of 2 experts", routed(routing(2, 3), true), "3 of 2 experts")?;
    refused("33 of 64 experts", routed(routing(64, 33), true), "33 of 64 experts")?;
    refused("2000 experts", routed(routing(2000, 1), true), "1 of 2000 experts")?;
    refused("logits in bf16", routed(routing(2, 1), false), "not f32")?;
    let mut experts = mixture.stack(&device, &mixture.up, [8, 16]).map_err(text)?;
    let data = vec![0; 8 * 16 * 4];
    let third = device.push_expert(&mut experts, &[WeightPart::plain(Format::F32, 8, 16, data)]);
    refused("a third of 2 experts", third, "after 2 of 2 matrices [8, 16]")?;
    let routes = Routes::new(&device, routing(2, 2), 1).map_err(text)?;
    let zeros = |rows, cols| Tensor::zeros(&device, rows, cols).map_err(text);
    let alone = device.combine(&mut zeros(1, 8)?, &zeros(2, 8)?, None, &routes);
    refused("no shared expert's result", alone, "no shared expert's result")?;
    let wide = device.expert_linear(
        &mut zeros(2, 8)?,
        &zeros(1, 24)?,
        ExpertRows::Tokens,
        &experts,
        &routes,
    );
    refused("24 columns", wide, "x is [1, 24], wanted [1, 16]")
}
