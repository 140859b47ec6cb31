//! Mixtures of experts on every CPU level against the plain backend, and bit for bit alone and
//! among others.

use kernels::{
    Backend, ExpertRows, Format, KernelError, PartShape, Routes, Routing, Tensor, WeightPart,
    plain::Plain,
};

use crate::common::{Random, assert_close, assert_same_bits, devices, host};

fn routing(experts: usize, per_token: usize) -> Routing {
    Routing { experts, per_token, normalise: experts % 2 == 1, shared: per_token.is_multiple_of(2) }
}

const HIDDEN: usize = 40;
const WIDTH: usize = 24;
/// Of results below 2.
const NEAR: f32 = 5e-6;

fn stack<B: Backend>(
    device: &B,
    (seed, experts): (u64, usize),
    [n, k]: [usize; 2],
) -> Result<B::Experts, KernelError> {
    let mut stack = device.experts(experts, &[PartShape::numbers(n, k)])?;
    for matrix in Random(seed).floats(experts * n * k).chunks_exact(n * k) {
        let data: Vec<u8> = matrix.iter().flat_map(|v| (v / 8.0).to_le_bytes()).collect();
        device.push_expert(&mut stack, &[WeightPart::plain(Format::F32, n, k, data)])?;
    }
    Ok(stack)
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

#[test]
fn every_level_agrees_with_the_oracle() {
    for (experts, per_token, tokens) in
        [(1, 1, 3), (4, 2, 0), (4, 2, 1), (8, 3, 20), (33, 8, 7), (64, 32, 2), (2, 1, 40)]
    {
        let routing = routing(experts, per_token);
        let x = Random(3).floats(tokens * HIDDEN);
        let logits: Vec<f32> =
            Random(4).floats(tokens * routing.logits()).iter().map(|v| v * 4.0).collect();
        let wanted = run(&Plain, routing, &x, &logits).unwrap();
        for (name, device) in devices() {
            let what = format!("{routing:?} by {name}");
            let got = run(&device, routing, &x, &logits).unwrap();
            assert_close(&what, &got.0, &wanted.0, NEAR);
            assert_close(&what, &got.1, &wanted.1, NEAR);
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
    let x = Random(5).floats(rows.len() * HIDDEN);
    let wanted = run(&Plain, routing, &x, rows.as_flattened()).unwrap();
    for (name, device) in devices() {
        let got = run(&device, routing, &x, rows.as_flattened()).unwrap();
        assert_close(&name, &got.0, &wanted.0, NEAR);
        assert_close(&name, &got.1, &wanted.1, NEAR);
    }
    // What is no number chooses some expert, and none that is not there.
    let (_, device) = devices().swap_remove(0);
    run(&device, routing, &x[..HIDDEN], &[f32::NAN; 7]).unwrap();
}

#[test]
fn a_token_is_the_same_alone_and_among_others() {
    let routing = routing(4, 2);
    let (x, logits) = (Random(6).floats(50 * HIDDEN), Random(7).floats(50 * routing.logits()));
    for (name, device) in devices() {
        let all = run(&device, routing, &x, &logits).unwrap().1;
        for some in [0..1, 49..50, 7..30] {
            let cut = |values: &[f32], cols: usize| -> Vec<f32> {
                values[some.start * cols..some.end * cols].to_vec()
            };
            let got = run(&device, routing, &cut(&x, HIDDEN), &cut(&logits, routing.logits()));
            let what = format!("tokens {some:?} by {name}");
            assert_same_bits(&what, &got.unwrap().1, &cut(&all, HIDDEN));
        }
    }
}
