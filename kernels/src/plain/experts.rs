//! Mixtures of experts: choosing, and products by pair.

use super::{Plain, PlainWeight, dot, row, row_mut};
use crate::{ExpertRows, KernelError, Routes, Tensor, host, shape};

/// One matrix for each expert, once all are pushed.
pub struct PlainExperts {
    pub(super) shape: [usize; 3],
    pub(super) each: Vec<PlainWeight>,
}

impl PlainExperts {
    pub(super) fn push(&mut self, weight: PlainWeight) -> Result<(), KernelError> {
        shape::push_expert(self.shape, self.each.len(), (weight.rows, weight.cols))?;
        self.each.push(weight);
        Ok(())
    }
}

pub(super) fn route(routes: &mut Routes<Plain>, logits: &Tensor<Plain>) -> Result<(), KernelError> {
    shape::route(routes, logits)?;
    let routing = routes.routing;
    for t in 0..logits.rows {
        let logits = row(logits, t);
        let of_experts = &logits[..routing.experts];
        let largest = of_experts.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let each: Vec<f64> =
            of_experts.iter().map(|&x| (f64::from(x) - f64::from(largest)).exp()).collect();
        let mut order: Vec<usize> = (0..routing.experts).collect();
        // Stable: of equals, the first.
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let chosen = &order[..routing.per_token];
        let counted = if routing.normalise { chosen } else { &order };
        let total: f64 = counted.iter().map(|&expert| each[expert]).sum();
        let weights = row_mut(&mut routes.weights, t);
        for (j, &expert) in chosen.iter().enumerate() {
            weights[j] = (each[expert] / total) as f32;
            routes.chosen[t * routing.per_token + j] = expert as i32;
        }
        if routing.shared {
            let gate = f64::from(logits[routing.experts]);
            weights[routing.per_token] = (1.0 / (1.0 + (-gate).exp())) as f32;
        }
    }
    Ok(host::sort_pairs(routes)?)
}

pub(super) fn expert_linear(
    out: &mut Tensor<Plain>,
    x: &Tensor<Plain>,
    rows: ExpertRows,
    experts: &PlainExperts,
    routes: &Routes<Plain>,
) -> Result<(), KernelError> {
    let [_, n, k] = experts.shape;
    shape::expert_linear(out, x, rows, [experts.each.len(), n, k], routes)?;
    let (pairs, starts) = host::expert_pairs(routes)?;
    for (expert, weight) in experts.each.iter().enumerate() {
        let (first, end) = (starts[expert] as usize, starts[expert + 1] as usize);
        for (place, &pair) in pairs.iter().enumerate().take(end).skip(first) {
            let from = match rows {
                ExpertRows::Tokens => pair as usize / routes.routing.per_token,
                ExpertRows::Pairs => place,
            };
            for (n, out) in row_mut(out, place).iter_mut().enumerate() {
                *out = dot(row(x, from), weight.row(n)) as f32;
            }
        }
    }
    Ok(())
}

pub(super) fn combine(
    out: &mut Tensor<Plain>,
    x: &Tensor<Plain>,
    shared: Option<&Tensor<Plain>>,
    routes: &Routes<Plain>,
) -> Result<(), KernelError> {
    shape::combine(out, x, shared, routes)?;
    let k = routes.routing.per_token;
    for (t, places) in host::expert_places(routes)?.chunks_exact(k).enumerate() {
        let weights = row(&routes.weights, t);
        for n in 0..out.cols {
            let term = |(&place, &weight): (&i32, &f32)| {
                f64::from(weight) * f64::from(row(x, place as usize)[n])
            };
            let chosen: f64 = places.iter().zip(weights).map(term).sum();
            let shared =
                shared.map_or(0.0, |shared| f64::from(weights[k]) * f64::from(row(shared, t)[n]));
            row_mut(out, t)[n] = (chosen + shared) as f32;
        }
    }
    Ok(())
}
