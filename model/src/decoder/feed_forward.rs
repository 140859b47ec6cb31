//! The second half of a layer: one block for all tokens, or a mixture of experts.

use super::{Context, Decoder, Shares, scratch::FfnScratch};
use crate::ModelError;
use collective::Collective;
use kernels::{Backend, ExpertRows, KernelError, ShapeError, Tensor};

/// What a layer does between its two norms and the next layer's.
pub(super) enum FeedForward<B: Backend> {
    Dense(Ffn<B>),
    Experts(Experts<B>),
}

/// down(silu(gate(x)) · up(x)).
pub(super) struct Ffn<B: Backend> {
    /// [2 I_local, H]: gate, then up.
    pub gate_up: B::Weight,
    /// [H_local, I]
    pub down: B::Weight,
}

/// A mixture of experts. Each expert's columns are spread over the ranks as those of a block are.
pub(super) struct Experts<B: Backend> {
    /// [E, H], and a row for the shared expert's gate.
    pub router: B::Weight,
    /// [E, 2 I_local, H]
    pub gate_up: B::Experts,
    /// [E, H_local, I]
    pub down: B::Experts,
    pub shared: Option<Ffn<B>>,
}

impl<B: Backend> FeedForward<B> {
    /// This rank's part of delta [T, H] of the normed rows.
    pub fn run<C: Collective<B>>(
        &self,
        cx: &mut Context<'_, B, C>,
        model: &Decoder<B>,
    ) -> Result<(), ModelError> {
        match self {
            Self::Dense(ffn) => {
                let s = &mut *cx.scratch;
                let delta = &mut s.delta.local;
                let cols = &model.shares.intermediate;
                ffn.run(cx.device, cx.group, (delta, &s.normed), &mut s.ffn, cols)
            }
            Self::Experts(experts) => experts.run(cx, &model.shares),
        }
    }
}

impl<B: Backend> Ffn<B> {
    /// out [T, H_local] of x [T, H]; `cols` are every rank's of I.
    fn run<C: Collective<B>>(
        &self,
        device: &B,
        group: &mut C,
        (out, x): (&mut Tensor<B>, &Tensor<B>),
        room: &mut FfnScratch<B>,
        cols: &[usize],
    ) -> Result<(), ModelError> {
        device.gated(&mut room.activation.local, &mut room.gate_up, x, &self.gate_up)?;
        let activation = room.activation.gather(device, group, cols)?;
        Ok(device.linear(out, activation, &self.down, None)?)
    }
}

impl<B: Backend> Experts<B> {
    fn run<C: Collective<B>>(
        &self,
        cx: &mut Context<'_, B, C>,
        shares: &Shares,
    ) -> Result<(), ModelError> {
        let (d, s) = (cx.device, &mut *cx.scratch);
        let room = s.experts.as_mut().ok_or_else(no_room)?;
        d.linear(&mut room.logits, &s.normed, &self.router, None)?;
        d.route(&mut room.routes, &room.logits)?;
        let (routes, ffn) = (&room.routes, &mut room.ffn);
        let (out, gate_up) = (&mut ffn.activation.local, &mut ffn.gate_up);
        d.expert_gated(out, gate_up, &s.normed, &self.gate_up, routes)?;
        let activation = ffn.activation.gather(d, cx.group, &shares.expert)?;
        d.expert_linear(&mut room.out, activation, ExpertRows::Pairs, &self.down, routes)?;
        let shared = match (&self.shared, &mut room.shared) {
            (Some(ffn), Some((room, out))) => {
                ffn.run(d, cx.group, (&mut *out, &s.normed), room, &shares.shared_expert)?;
                Some(&*out)
            }
            _ => None,
        };
        Ok(d.combine(&mut s.delta.local, &room.out, shared, routes)?)
    }
}

fn no_room() -> KernelError {
    ShapeError { op: "experts", detail: "the scratch memory has no room for experts".into() }.into()
}
