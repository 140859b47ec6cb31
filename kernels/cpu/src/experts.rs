//! Mixtures of experts: each expert's tokens together, one expert after another.

use super::{
    Cpu, CpuWeight,
    linear::{Product, linear},
    rows::{self, Combine},
    simd::dispatch,
    used, used_mut,
};
use kernels::{ExpertRows, KernelError, Routes, Tensor, host, shape};
use std::sync::PoisonError;

/// A matrix of each expert, once all are pushed.
pub struct CpuExperts {
    shape: [usize; 3],
    each: Vec<CpuWeight>,
}

impl CpuExperts {
    pub(super) fn new(shape: [usize; 3]) -> Self {
        Self { shape, each: Vec::new() }
    }

    pub(super) fn push(&mut self, weight: CpuWeight) -> Result<(), KernelError> {
        shape::push_expert(self.shape, self.each.len(), (weight.rows(), weight.cols()))?;
        self.each.push(weight);
        Ok(())
    }
}

pub(super) fn route(routes: &mut Routes<Cpu>, logits: &Tensor<Cpu>) -> Result<(), KernelError> {
    shape::route(routes, logits)?;
    let routing = routes.routing;
    let k = routing.per_token;
    let (each, width) = (logits.cols, routing.weights());
    let rows = used(logits).chunks_exact(each).zip(routes.chosen.chunks_exact_mut(k));
    let weights = routes.weights.data.chunks_exact_mut(width);
    for ((logits, chosen), weights) in rows.zip(weights) {
        let (of_experts, gate) = logits.split_at(routing.experts);
        let largest = choose(of_experts, &mut weights[..k], chosen);
        let weight = |logit: f32| (logit - largest).exp();
        let total: f32 = match routing.normalise {
            true => weights[..k].iter().copied().map(weight).sum(),
            false => of_experts.iter().copied().map(weight).sum(),
        };
        weights[..k].iter_mut().for_each(|logit| *logit = weight(*logit) / total);
        if let [gate] = gate {
            weights[k] = 1.0 / (1.0 + (-gate).exp());
        }
    }
    Ok(host::sort_pairs(routes)?)
}

/// The largest logits and their experts, falling, the first of equals first; the largest of all.
fn choose(logits: &[f32], largest: &mut [f32], experts: &mut [i32]) -> f32 {
    let mut held = 0;
    for (expert, &logit) in logits.iter().enumerate() {
        let place = largest[..held].iter().rposition(|held| held.total_cmp(&logit).is_ge());
        let place = place.map_or(0, |before| before + 1);
        if place == largest.len() {
            continue;
        }
        held = (held + 1).min(largest.len());
        largest[place..held].rotate_right(1);
        experts[place..held].rotate_right(1);
        (largest[place], experts[place]) = (logit, expert as i32);
    }
    largest[0]
}

impl Cpu {
    pub(super) fn multiply_by_expert(
        &self,
        out: &mut Tensor<Cpu>,
        x: &Tensor<Cpu>,
        rows: ExpertRows,
        experts: &CpuExperts,
        routes: &Routes<Cpu>,
    ) -> Result<(), KernelError> {
        let [_, n, k] = experts.shape;
        shape::expert_linear(out, x, rows, [experts.each.len(), n, k], routes)?;
        let (pairs, starts) = host::expert_pairs(routes)?;
        let (x, out) = (used(x), used_mut(out));
        let mut scratch = self.linear.lock().unwrap_or_else(PoisonError::into_inner);
        let mut gathered = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        for (weight, ends) in experts.each.iter().zip(starts.windows(2)) {
            let places = ends[0] as usize..ends[1] as usize;
            if places.is_empty() {
                continue;
            }
            let tokens = pairs[places.clone()].iter();
            let mut tokens = tokens.map(|pair| *pair as usize / routes.routing.per_token);
            let x = match (rows, places.len()) {
                (ExpertRows::Pairs, count) => &x[places.start * k..][..count * k],
                (ExpertRows::Tokens, 1) => &x[tokens.next().unwrap_or(0) * k..][..k],
                (ExpertRows::Tokens, count) => {
                    let room = gathered.len().max(count * k);
                    gathered.resize(room, 0.0);
                    for (to, token) in gathered.chunks_exact_mut(k).zip(tokens) {
                        to.copy_from_slice(&x[token * k..][..k]);
                    }
                    &gathered[..count * k]
                }
            };
            let out = &mut out[places.start * n..places.end * n];
            let product = Product { x, rows: places.len(), weight, bias: None };
            linear(&self.pool, self.isa(), &mut scratch, out, product)?;
        }
        Ok(())
    }

    pub(super) fn combine_experts(
        &self,
        out: &mut Tensor<Cpu>,
        x: &Tensor<Cpu>,
        shared: Option<&Tensor<Cpu>>,
        routes: &Routes<Cpu>,
    ) -> Result<(), KernelError> {
        shape::combine(out, x, shared, routes)?;
        let (cols, k) = (out.cols, routes.routing.per_token);
        let width = routes.routing.weights();
        let (x, shared) = (used(x), shared.map(used));
        let (places, weights) = (host::expert_places(routes)?, used(&routes.weights));
        rows::split(&self.pool, used_mut(out), (cols, 1 + k), &|first, out| {
            let (places, weights) = (&places[first * k..], &weights[first * width..]);
            let shared = shared.map(|shared| &shared[first * cols..]);
            dispatch(self.level, Combine { out, x, shared, places, weights, cols, k });
        });
        Ok(())
    }
}
