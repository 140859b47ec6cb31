//! Products by expert in every format that weights are kept in, alone and behind silu(gate) · up;
//! with the same bits in every company.

use super::routing;
use crate::{
    BF16, Check, Device,
    flat::{guarded, refused, text, unwritten, written},
    int4::Matrix,
    linear::{FP8, Product, near, quantised, widened},
    noise, random, rounded,
};
use cuda::{Cuda, CudaConfig, CudaExperts, Driver};
use half::bf16;
use kernels::{
    Backend, ExpertRows, Format, KernelError, PartShape, RandomFormat, Routes, Routing, Tensor,
    WeightPart, plain::Plain,
};

pub(super) fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "experts: bf16", run: in_bf16 },
        Check { name: "experts: e4m3", run: in_e4m3 },
        Check { name: "experts: int4", run: in_int4 },
        Check { name: "experts: int4 from a seed", run: from_seed },
        Check { name: "experts: the same bits in every company", run: company },
        Check { name: "experts: overlapping kernels", run: overlapping },
        Check { name: "experts: formats that are refused", run: refusals },
    ]
}

/// A matrix [N, K] of each expert: gate and up of N / 2 rows.
struct Stacks<'a> {
    /// N and K.
    shape: (usize, usize),
    each: Vec<Vec<WeightPart<'a>>>,
    /// [N, K] of each, as the device holds it.
    held: Vec<Vec<f64>>,
}

impl Stacks<'_> {
    /// Rows of very different sizes, which no scale of another can stand for.
    fn numbers(seed: u64, experts: usize, (n, k): (usize, usize), is_e4m3: bool) -> Self {
        let matrices = (0..experts).map(|expert| {
            let Product { weight, .. } = Product::new(seed + 3 * expert as u64, (0, n, k), false);
            let half = |values: &[f32]| {
                let data = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes());
                WeightPart::plain(Format::Bf16, n / 2, k, data.collect::<Vec<u8>>())
            };
            let parts: Vec<_> = weight.chunks_exact(n / 2 * k).map(half).collect();
            (parts, if is_e4m3 { quantised(&weight, k) } else { widened(&weight) })
        });
        let (each, held) = matrices.unzip();
        Self { shape: (n, k), each, held }
    }

    /// `shape` is rows of gate and of up, columns, those of a group, and where in one they begin.
    /// Permuted columns are rounded to bf16.
    fn integers(seed: u64, experts: usize, shape: [usize; 4], is_permuted: bool) -> Self {
        let [i, k, ..] = shape;
        let matrices = (0..experts as u64).map(|expert| {
            let halves = [0, 1].map(|half| {
                let mut matrix = Matrix::new(seed + 20 * expert + 10 * half, shape);
                if is_permuted {
                    let group = |col: usize| (col + expert as usize) * 3 / 7 % 3;
                    matrix.column_groups = Some((0..k).map(group).collect());
                }
                matrix
            });
            let places = (0..2 * i).flat_map(|row| (0..k).map(move |col| (row, col)));
            let value = |(row, col): (usize, usize)| {
                let exact = halves[row / i].weight(row % i, col);
                f64::from(if is_permuted { bf16::from_f32(exact).to_f32() } else { exact })
            };
            (halves.each_ref().map(Matrix::part).to_vec(), places.map(value).collect())
        });
        let (each, held) = matrices.unzip();
        Self { shape: (2 * i, k), each, held }
    }

    fn upload<D: Driver>(&self, device: &Cuda<D>, are_gate_ups: bool) -> Uploaded<D> {
        let stack: Vec<PartShape> = self.each[0].iter().map(WeightPart::shape).collect();
        let mut experts = match are_gate_ups {
            true => device.expert_gate_ups(self.each.len(), &stack),
            false => device.experts(self.each.len(), &stack),
        }
        .map_err(text)?;
        for parts in &self.each {
            device.push_expert(&mut experts, parts).map_err(text)?;
        }
        Ok(experts)
    }

    /// Row `row` of x times a matrix, and the sum of the terms' sizes.
    fn product(&self, expert: usize, x: &[f32]) -> Vec<(f64, f64)> {
        let row = |weight: &[f64]| {
            let terms = || x.iter().zip(weight).map(|(x, w)| f64::from(*x) * w);
            (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>())
        };
        self.held[expert].chunks_exact(self.shape.1).map(row).collect()
    }

    /// Both products of so many tokens with k of the experts, against the oracle and one another.
    fn agree<D: Driver>(
        &self,
        device: &Cuda<D>,
        (per_token, tokens): (usize, usize),
    ) -> Result<(), String> {
        let step = Step::new(device, routing(self.each.len(), per_token), tokens)?;
        let (n, k) = self.shape;
        let what = format!("{tokens} tokens, {per_token} of {} [{n}, {k}]", self.each.len());
        let case = |error: String| format!("{what}: {error}");
        let (rows, gate_ups) = (self.upload(device, false)?, self.upload(device, true)?);
        for of in [ExpertRows::Tokens, ExpertRows::Pairs] {
            let x = step.x(of, k);
            let got = step.multiply(device, &rows, &x, of, n).map_err(case)?;
            near(&what, &got, &step.oracle(self, &x, of), 1e-6)?;
            if of == ExpertRows::Tokens {
                let apart = silu_mul(device, &got, n).map_err(case)?;
                let fused = step.gated(device, &gate_ups, &x, n).map_err(case)?;
                same_bits(&what, &fused, &apart)?;
            }
        }
        Ok(())
    }
}

type Uploaded<D> = Result<CudaExperts<D>, String>;

/// Where a step's pairs go, on the device and as the oracle says.
struct Step<D: Driver> {
    routes: Routes<Cuda<D>>,
    plain: Routes<Plain>,
}

impl<D: Driver> Step<D> {
    fn new(device: &Cuda<D>, routing: Routing, tokens: usize) -> Result<Self, String> {
        Self::of(device, routing, &noise(31, tokens * routing.logits()))
    }

    fn of(device: &Cuda<D>, routing: Routing, logits: &[f32]) -> Result<Self, String> {
        let tokens = logits.len() / routing.logits();
        Ok(Self {
            routes: routed(device, routing, tokens, logits).map_err(text)?,
            plain: routed(&Plain, routing, tokens, logits).map_err(text)?,
        })
    }

    fn x(&self, of: ExpertRows, cols: usize) -> Vec<f32> {
        let rows = match of {
            ExpertRows::Tokens => self.routes.tokens(),
            ExpertRows::Pairs => self.routes.pairs(),
        };
        rounded(&noise(32, rows * cols))
    }

    fn multiply(
        &self,
        device: &Cuda<D>,
        experts: &CudaExperts<D>,
        x: &[f32],
        of: ExpertRows,
        n: usize,
    ) -> Result<Vec<f32>, String> {
        let x = guarded(device, experts_cols(x, self, of), x).map_err(text)?;
        let mut out = unwritten(device, self.routes.pairs(), n).map_err(text)?;
        device.expert_linear(&mut out, &x, of, experts, &self.routes).map_err(text)?;
        written(device, &out)
    }

    fn gated(
        &self,
        device: &Cuda<D>,
        experts: &CudaExperts<D>,
        x: &[f32],
        n: usize,
    ) -> Result<Vec<f32>, String> {
        let cols = experts_cols(x, self, ExpertRows::Tokens);
        let x = guarded(device, cols, x).map_err(text)?;
        let mut room = unwritten(device, self.routes.pairs(), n).map_err(text)?;
        let mut out = unwritten(device, self.routes.pairs(), n / 2).map_err(text)?;
        device.expert_gated(&mut out, &mut room, &x, experts, &self.routes).map_err(text)?;
        written(device, &room)?;
        written(device, &out)
    }

    /// By place, each result and the sum of its terms' sizes.
    fn oracle(&self, stacks: &Stacks<'_>, x: &[f32], of: ExpertRows) -> Vec<(f64, f64)> {
        let (k, per_token) = (stacks.shape.1, self.plain.routing.per_token);
        let pairs = self.plain.pairs.iter().take(self.plain.pairs()).enumerate();
        let of_place = |(place, &pair): (usize, &i32)| {
            let row = match of {
                ExpertRows::Tokens => pair as usize / per_token,
                ExpertRows::Pairs => place,
            };
            stacks.product(self.plain.chosen[pair as usize] as usize, &x[row * k..][..k])
        };
        pairs.flat_map(of_place).collect()
    }

    /// The rows of a result by pair, not by place.
    fn by_pair(&self, rows: &[f32], cols: usize) -> Vec<f32> {
        let places = self.plain.places.iter().take(self.plain.pairs());
        places.flat_map(|&place| rows[place as usize * cols..][..cols].iter().copied()).collect()
    }
}

fn routed<B: Backend>(
    device: &B,
    routing: Routing,
    tokens: usize,
    logits: &[f32],
) -> Result<Routes<B>, KernelError> {
    let mut routes = Routes::new(device, routing, tokens)?;
    device.route(&mut routes, &Tensor::exact_from_host(device, routing.logits(), logits)?)?;
    Ok(routes)
}

/// Columns of rows that are as many as a step has of them.
fn experts_cols<D: Driver>(x: &[f32], step: &Step<D>, of: ExpertRows) -> usize {
    match of {
        ExpertRows::Tokens => x.len() / step.routes.tokens(),
        ExpertRows::Pairs => x.len() / step.routes.pairs(),
    }
}

fn silu_mul<D: Driver>(device: &Cuda<D>, x: &[f32], cols: usize) -> Result<Vec<f32>, String> {
    let x = Tensor::from_host(device, cols, x).map_err(text)?;
    let mut out = unwritten(device, x.rows, cols / 2).map_err(text)?;
    device.silu_mul(&mut out, &x).map_err(text)?;
    written(device, &out)
}

fn same_bits(what: &str, got: &[f32], wanted: &[f32]) -> Result<(), String> {
    match got.iter().zip(wanted).position(|(a, b)| a.to_bits() != b.to_bits()) {
        _ if got.len() != wanted.len() => Err(format!("{what}: {} results", got.len())),
        None => Ok(()),
        Some(at) => Err(format!("{what}: element {at} is {}, wanted {}", got[at], wanted[at])),
    }
}

/// Experts, those of a token, tokens, N and K: about the ends of places at once, of strips, tiles
/// and records. Of two experts each has all 70 tokens, and is walked twice; of 31 some have none.
const SHAPES: [(usize, usize, usize, usize, usize); 7] = [
    (1, 1, 1, 16, 16),
    (31, 3, 9, 48, 80),
    (3, 2, 17, 272, 144),
    (2, 1, 40, 80, 64),
    (2, 2, 70, 80, 272),
    (5, 1, 200, 16, 48),
    (129, 2, 2, 16, 32),
];

fn of_numbers<D: Driver>(device: &Cuda<D>, is_e4m3: bool) -> Result<(), String> {
    for (seed, (experts, per_token, tokens, n, k)) in SHAPES.into_iter().enumerate() {
        let stacks = Stacks::numbers(40 + seed as u64, experts, (n, k), is_e4m3);
        stacks.agree(device, (per_token, tokens))?;
    }
    Ok(())
}

fn in_bf16<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    of_numbers(&device(BF16), false)
}

fn in_e4m3<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    of_numbers(&device(FP8), true)
}

/// Every length of groups, columns that begin inside one, and permuted ones.
fn in_int4<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    // `--weights fp8` leaves integers alone.
    for (config, experts, per_token, tokens, shape, is_permuted) in [
        (BF16, 3, 2, 5, [40, 144, 128, 112], false),
        (FP8, 2, 2, 70, [72, 256, 32, 0], false),
        (BF16, 4, 1, 33, [16, 192, 64, 0], false),
        (BF16, 3, 1, 10, [24, 192, 64, 0], true),
    ] {
        let stacks = Stacks::integers(60, experts, shape, is_permuted);
        stacks.agree(&device(config), (per_token, tokens))?;
    }
    Ok(())
}

/// What the device makes is what the host makes, in the same places.
fn from_seed<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let (rows, k, experts) = (40, 136, 3);
    let stack = |expert| random::stack(RandomFormat::Int4 { group: 32 }, &[rows; 2], (expert, k));
    let random = Stacks {
        shape: (2 * rows, k),
        each: (0..experts).map(|_| stack(8)).collect(),
        held: Vec::new(),
    };
    let all_made = random
        .each
        .iter()
        .map(|parts| parts.iter().map(|part| part.made().into_owned()).collect::<Vec<_>>());
    let made = Stacks { shape: random.shape, each: all_made.collect(), held: Vec::new() };
    let step = Step::new(&device, routing(experts, 2), 9)?;
    let x = step.x(ExpertRows::Tokens, k);
    let [got, wanted] = [&random, &made].map(|stacks| {
        let experts = stacks.upload(&device, true)?;
        step.gated(&device, &experts, &x, 2 * rows)
    });
    same_bits("from a seed", &got?, &wanted?)
}

/// Tokens alone and a few together, against all of them.
fn company<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    const ALL: usize = 70;
    let (n, k) = (48, 272);
    let numbers = |is_e4m3| Stacks::numbers(80, 2, (n, k), is_e4m3);
    let integers = Stacks::integers(81, 2, [n / 2, k, 128, 0], false);
    let forms = [(BF16, numbers(false)), (FP8, numbers(true)), (BF16, integers)];
    for (config, stacks) in forms {
        let device = device(config);
        let routing = routing(2, 2);
        let experts = stacks.upload(&device, false)?;
        let logits = noise(82, ALL * routing.logits());
        let x = rounded(&noise(83, ALL * k));
        let run = |tokens: std::ops::Range<usize>| {
            let cut = |all: &[f32], cols: usize| {
                all[tokens.start * cols..][..tokens.len() * cols].to_vec()
            };
            let step = Step::of(&device, routing, &cut(&logits, routing.logits()))?;
            let got = step.multiply(&device, &experts, &cut(&x, k), ExpertRows::Tokens, n)?;
            Ok::<_, String>(step.by_pair(&got, n))
        };
        let all = run(0..ALL)?;
        for some in [0..1, 69..70, 3..5, 10..22, 40..57, 20..60] {
            let wanted = &all[some.start * 2 * n..some.end * 2 * n];
            same_bits(&format!("{config:?}, tokens {some:?}"), &run(some.clone())?, wanted)?;
        }
    }
    Ok(())
}

/// A layer's kernels as a graph of dependent launches leave what they leave one after another.
fn overlapping<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let routing = Routing { experts: 6, per_token: 2, normalise: true, shared: false };
    let (tokens, hidden, width) = (5, 144, 80);
    let up = Stacks::numbers(90, routing.experts, (2 * width, hidden), false);
    let down = Stacks::numbers(91, routing.experts, (hidden, width), false);
    let run = |config: CudaConfig, is_captured: bool| {
        let device = device(config);
        let (up, down) = (up.upload(&device, true)?, down.upload(&device, false)?);
        let mut routes = Routes::new(&device, routing, tokens).map_err(text)?;
        let logits = noise(92, tokens * routing.logits());
        let logits = Tensor::exact_from_host(&device, routing.logits(), &logits).map_err(text)?;
        let x = Tensor::from_host(&device, hidden, &rounded(&noise(93, tokens * hidden)));
        let x = x.map_err(text)?;
        let pairs = |cols| unwritten(&device, tokens * routing.per_token, cols).map_err(text);
        let (mut room, mut inner, mut each) = (pairs(2 * width)?, pairs(width)?, pairs(hidden)?);
        let mut out = unwritten(&device, tokens, hidden).map_err(text)?;
        let mut layer = || {
            device.route(&mut routes, &logits)?;
            device.expert_gated(&mut inner, &mut room, &x, &up, &routes)?;
            device.expert_linear(&mut each, &inner, ExpertRows::Pairs, &down, &routes)?;
            device.combine(&mut out, &each, None, &routes)
        };
        if is_captured {
            device.driver().begin_capture().map_err(text)?;
            let done = layer();
            let graph = device.driver().end_capture().map_err(text)?;
            done.map_err(text)?;
            device.driver().replay(&graph).map_err(text)?;
        } else {
            layer().map_err(text)?;
        }
        written(&device, &out)
    };
    let apart = run(CudaConfig { overlap: false, ..BF16 }, false)?;
    same_bits("not as one by one", &run(BF16, true)?, &apart)
}

fn refusals<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    let integers = Stacks::integers(95, 1, [8, 64, 32, 0], false);
    let stack: Vec<PartShape> = integers.each[0].iter().map(WeightPart::shape).collect();
    let mut experts = device.experts(1, &stack).map_err(text)?;
    let numbers = Stacks::numbers(96, 1, (16, 64), false);
    let other = device.push_expert(&mut experts, &numbers.each[0]);
    refused("an expert of numbers", other, "not stored as integers in the groups")?;
    let odd = device.experts(2, &[PartShape::numbers(12, 64)]).map(drop);
    refused("12 rows", odd, "[12, 64]: rows and columns are no multiples of 8")?;
    let step = Step::new(&device, routing(1, 1), 1)?;
    let zeros = |cols| Tensor::zeros(&device, 1, cols).map_err(text);
    let pairs = numbers.upload(&device, true)?;
    let (x, of) = (zeros(64)?, ExpertRows::Tokens);
    let linear = device.expert_linear(&mut zeros(16)?, &x, of, &pairs, &step.routes);
    refused("gates and ups", linear, "by `expert_gated` alone")?;
    let rows = numbers.upload(&device, false)?;
    let gated = device.expert_gated(&mut zeros(8)?, &mut zeros(16)?, &x, &rows, &step.routes);
    refused("no gates and ups", gated, "no gates and ups")
}
