//! Mixtures of experts on every CPU level against the plain backend, and bit for bit alone and
//! among others.

use cpu::{Cpu, CpuConfig, Isa, Precision};
use kernels::{
    Backend, ExpertRows, Format, KernelError, Routes, Routing, Tensor, WeightPart, plain::Plain,
};

/// Reproducible values in [-1, 1), exact in half precision.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (state >> 33) % 2048
    };
    (0..len).map(|_| next() as f32 / 1024.0 - 1.0).collect()
}

fn routing(experts: usize, per_token: usize) -> Routing {
    Routing { experts, per_token, normalise: experts % 2 == 1, shared: per_token.is_multiple_of(2) }
}

const HIDDEN: usize = 40;
const WIDTH: usize = 24;

fn stack<B: Backend>(
    device: &B,
    (seed, experts): (u64, usize),
    [n, k]: [usize; 2],
) -> Result<B::Experts, KernelError> {
    let mut stack = device.experts([experts, n, k])?;
    for matrix in noise(seed, experts * n * k).chunks_exact(n * k) {
        let data: Vec<u8> = matrix.iter().flat_map(|v| (v / 8.0).to_le_bytes()).collect();
        device.push_expert(&mut stack, &[WeightPart::plain(Format::F32, n, k, data)])?;
    }
    Ok(stack)
}

fn host<B: Backend>(device: &B, tensor: &Tensor<B>) -> Vec<f32> {
    let mut values = vec![0.0; tensor.rows * tensor.cols];
    device.read_floats(&mut values, &tensor.data).unwrap();
    values
}

/// Weights and results of the tokens in `x` [T, H], whose logits are `logits`.
fn run<B: Backend>(
    device: &B,
    routing: Routing,
    x: &[f32],
    logits: &[f32],
) -> Result<(Vec<f32>, Vec<f32>), KernelError> {
    let tokens = x.len() / HIDDEN;
    let up = stack(device, (1, routing.experts), [WIDTH, HIDDEN])?;
    let down = stack(device, (2, routing.experts), [HIDDEN, WIDTH])?;
    let mut routes = Routes::new(device, routing, tokens)?;
    let x = Tensor::from_host(device, HIDDEN, x)?;
    device.route(&mut routes, &Tensor::exact_from_host(device, routing.logits(), logits)?)?;
    let mut inner = Tensor::zeros(device, routes.pairs(), WIDTH)?;
    device.expert_linear(&mut inner, &x, ExpertRows::Tokens, &up, &routes)?;
    let mut each = Tensor::zeros(device, routes.pairs(), HIDDEN)?;
    device.expert_linear(&mut each, &inner, ExpertRows::Pairs, &down, &routes)?;
    let mut out = Tensor::zeros(device, tokens, HIDDEN)?;
    // Any rows will do for the shared expert's.
    device.combine(&mut out, &each, routing.shared.then_some(&x), &routes)?;
    Ok((host(device, &routes.weights), host(device, &out)))
}

fn devices() -> impl Iterator<Item = Cpu> {
    let levels = Isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect());
    let each = |isa| {
        let precisions = [Precision::Exact, Precision::Fast].into_iter();
        precisions.flat_map(move |precision| {
            (1..=2).map(move |threads| Cpu::new(CpuConfig { threads, precision, isa }).unwrap())
        })
    };
    levels.flat_map(each)
}

#[track_caller]
fn assert_close(what: &str, got: &[f32], wanted: &[f32]) {
    assert_eq!(got.len(), wanted.len());
    for (at, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        assert!((got - wanted).abs() < 1e-5, "{what} [{at}]: {got}, wanted {wanted}");
    }
}

#[test]
fn every_level_agrees_with_the_oracle() {
    for (experts, per_token, tokens) in
        [(1, 1, 3), (4, 2, 0), (4, 2, 1), (8, 3, 20), (33, 8, 7), (64, 32, 2), (2, 1, 40)]
    {
        let routing = routing(experts, per_token);
        let x = noise(3, tokens * HIDDEN);
        let logits: Vec<f32> =
            noise(4, tokens * routing.logits()).iter().map(|v| v * 4.0).collect();
        let wanted = run(&Plain, routing, &x, &logits).unwrap();
        for device in devices() {
            let what = format!("{routing:?} by {:?}", device.isa());
            let got = run(&device, routing, &x, &logits).unwrap();
            assert_close(&what, &got.0, &wanted.0);
            assert_close(&what, &got.1, &wanted.1);
        }
    }
}

#[test]
fn of_equal_logits_the_first_counts() {
    let routing = routing(7, 3);
    let rows = [
        [0.5; 7],
        [1.0, 2.0, 2.0, 1.0, 2.0, 2.0, 1.0],
        [f32::NEG_INFINITY, -1.0, f32::NEG_INFINITY, -1.0, -90.0, -90.0, -91.0],
        [-0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0],
    ];
    let x = noise(5, rows.len() * HIDDEN);
    let wanted = run(&Plain, routing, &x, rows.as_flattened()).unwrap();
    for device in devices() {
        let got = run(&device, routing, &x, rows.as_flattened()).unwrap();
        assert_close("weights", &got.0, &wanted.0);
        assert_close("results", &got.1, &wanted.1);
    }
    // What is no number chooses some expert, and none that is not there.
    let device = devices().next().unwrap();
    run(&device, routing, &x[..HIDDEN], &[f32::NAN; 7]).unwrap();
}

#[test]
fn a_token_is_the_same_alone_and_among_others() {
    let routing = routing(4, 2);
    let (x, logits) = (noise(6, 50 * HIDDEN), noise(7, 50 * routing.logits()));
    for device in devices() {
        let all = run(&device, routing, &x, &logits).unwrap().1;
        for some in [0..1, 49..50, 7..30] {
            let cut = |values: &[f32], cols: usize| -> Vec<f32> {
                values[some.start * cols..some.end * cols].to_vec()
            };
            let got = run(&device, routing, &cut(&x, HIDDEN), &cut(&logits, routing.logits()));
            assert_eq!(got.unwrap().1, cut(&all, HIDDEN), "tokens {some:?} by {:?}", device.isa());
        }
    }
}
