//! The matrices of a model, and which rows of each a rank holds.

use std::ops::Range;

use kernels::Join;

use super::{
    Qkv, TensorNames,
    module::{Cut, Module, Place},
    stacks::Role,
};
use crate::{DecoderConfig, Shard};

/// A feed-forward block of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FfnBlock {
    /// The one of a layer without experts.
    Dense,
    /// That of one expert.
    Expert(usize),
    /// That of the expert that every token goes to.
    SharedExpert,
}

/// Matrices as a configuration asks for them, named as one file format does.
#[derive(Clone, Copy)]
pub(super) struct Modules<'a> {
    pub config: &'a DecoderConfig,
    pub names: &'a TensorNames,
}

impl Modules<'_> {
    /// Every matrix of a shard, in the order of use.
    pub fn all(self, shard: &Shard) -> Vec<(Module, Cut)> {
        self.stacks(shard).flat_map(|(_, cuts)| cuts).collect()
    }

    /// Matrices that become one weight together.
    pub fn stacks(self, shard: &Shard) -> impl Iterator<Item = (Role, Vec<(Module, Cut)>)> {
        let tables = self.tables(shard).into_iter().map(|cut| (Role::Table, vec![cut]));
        tables.chain((0..self.config.layers).flat_map(move |layer| self.layer(layer, shard)))
    }

    /// Those of a layer. Experts' are gate and up of one, then its down.
    pub fn layer(self, layer: usize, shard: &Shard) -> Vec<(Role, Vec<(Module, Cut)>)> {
        let mut stacks = vec![
            (Role::Weight, self.qkv(layer, shard).into()),
            (Role::Weight, vec![self.attn_out(layer, shard)]),
        ];
        let router = self.router(layer);
        stacks.extend((!router.is_empty()).then_some((Role::Table, router)));
        for block in self.ffn_blocks(layer) {
            let role = match block {
                FfnBlock::Expert(_) => Role::Expert,
                FfnBlock::Dense | FfnBlock::SharedExpert => Role::Weight,
            };
            stacks.push((role, self.gate_up(layer, block, shard).into()));
            stacks.push((role, vec![self.down(layer, block, shard)]));
        }
        stacks
    }

    /// The embedding, and what makes logits where that is another matrix.
    pub fn tables(self, shard: &Shard) -> Vec<(Module, Cut)> {
        let mut cuts = vec![self.embed(shard)];
        if !self.config.tied {
            cuts.push(self.lm_head(shard));
        }
        cuts
    }

    pub fn embed(self, shard: &Shard) -> (Module, Cut) {
        self.table(self.names.embed, shard)
    }

    /// The embedding where tied.
    pub fn lm_head(self, shard: &Shard) -> (Module, Cut) {
        self.table(if self.config.tied { self.names.embed } else { self.names.lm_head }, shard)
    }

    fn table(self, name: &str, shard: &Shard) -> (Module, Cut) {
        let shape = (self.config.vocab, self.config.hidden);
        (Module::new(name.to_owned(), shape), Cut::Rows(shard.vocab.clone()))
    }

    fn of_layer(self, layer: usize, name: &str, shape: (usize, usize)) -> Module {
        Module::new(self.names.of_layer(layer, name), shape)
    }

    /// Q, K and V.
    pub fn qkv(self, layer: usize, shard: &Shard) -> [(Module, Cut); 3] {
        let DecoderConfig { hidden, head_dim: dim, q_heads, kv_heads, .. } = *self.config;
        let (stems, firsts, all) = match self.names.qkv {
            Qkv::Separate(stems) => (stems, [0; 3], [q_heads, kv_heads, kv_heads]),
            Qkv::Packed(stem) => {
                ([stem; 3], [0, q_heads, q_heads + kv_heads], [q_heads + 2 * kv_heads; 3])
            }
        };
        let heads = [&shard.q_heads, &shard.kv_heads, &shard.kv_heads];
        std::array::from_fn(|i| {
            let rows = (firsts[i] + heads[i].start) * dim..(firsts[i] + heads[i].end) * dim;
            let cut = match self.names.interleaved_rope && i < 2 {
                true => Cut::Heads { rows, head_dim: dim },
                false => Cut::Rows(rows),
            };
            (self.of_layer(layer, stems[i], (all[i] * dim, hidden)), cut)
        })
    }

    pub fn attn_out(self, layer: usize, shard: &Shard) -> (Module, Cut) {
        let shape = (self.config.hidden, self.config.q_heads * self.config.head_dim);
        let dim = self.config.head_dim;
        let own = shard.q_heads.start * dim..shard.q_heads.end * dim;
        (self.of_layer(layer, self.names.attn_out, shape), self.joined(shard, own))
    }

    /// What chooses experts, then the shared expert's gate: whole on every rank. None in a layer
    /// without experts.
    pub fn router(self, layer: usize) -> Vec<(Module, Cut)> {
        let Some(experts) = self.config.experts_of(layer) else { return Vec::new() };
        let names = &self.names.experts;
        let router = [(names.router, experts.count)];
        let gate = experts.shared.map(|_| (names.shared_gate, 1));
        let each = |(name, rows)| {
            (self.of_layer(layer, name, (rows, self.config.hidden)), Cut::Rows(0..rows))
        };
        router.into_iter().chain(gate).map(each).collect()
    }

    /// The feed-forward blocks of a layer.
    pub fn ffn_blocks(self, layer: usize) -> Vec<FfnBlock> {
        let Some(experts) = self.config.experts_of(layer) else { return vec![FfnBlock::Dense] };
        let shared = experts.shared.map(|_| FfnBlock::SharedExpert);
        (0..experts.count).map(FfnBlock::Expert).chain(shared).collect()
    }

    pub fn gate_up(self, layer: usize, block: FfnBlock, shard: &Shard) -> [(Module, Cut); 2] {
        let (names, width) = self.ffn(layer, block);
        let (shape, rows) = ((width, self.config.hidden), own_cols(block, shard));
        [names.gate, names.up]
            .map(|name| (self.of_block(layer, block, name, shape), Cut::Rows(rows.clone())))
    }

    pub fn down(self, layer: usize, block: FfnBlock, shard: &Shard) -> (Module, Cut) {
        let (names, width) = self.ffn(layer, block);
        let shape = (self.config.hidden, width);
        let cut = self.joined(shard, own_cols(block, shard).clone());
        (self.of_block(layer, block, names.down, shape), cut)
    }

    /// What a rank holds of a matrix whose inputs are spread over the ranks, `own` being here.
    fn joined(self, shard: &Shard, own: Range<usize>) -> Cut {
        match shard.join {
            Join::Gather => Cut::Rows(shard.hidden.clone()),
            Join::Sum => Cut::Columns { rows: 0..self.config.hidden, cols: own },
        }
    }

    /// Names of a block's matrices and its width: 0 where the layer has no such block.
    fn ffn(self, layer: usize, block: FfnBlock) -> (super::FfnNames, usize) {
        let experts = self.config.experts_of(layer);
        let (names, width) = match block {
            FfnBlock::Dense => (self.names.ffn, Some(self.config.intermediate)),
            FfnBlock::Expert(_) => (self.names.experts.each, experts.map(|e| e.intermediate)),
            FfnBlock::SharedExpert => {
                (self.names.experts.shared, experts.and_then(|experts| experts.shared))
            }
        };
        (names, width.unwrap_or_default())
    }

    fn of_block(self, layer: usize, block: FfnBlock, name: &str, shape: (usize, usize)) -> Module {
        match (block, self.names.experts.folder) {
            (FfnBlock::Expert(index), Some(folder)) => {
                self.of_layer(layer, &format!("{folder}.{index}.{name}"), shape)
            }
            (FfnBlock::Expert(index), None) => {
                let count = self.config.experts_of(layer).map_or(0, |experts| experts.count);
                let place = Some(Place { index, count });
                Module { place, ..self.of_layer(layer, name, shape) }
            }
            _ => self.of_layer(layer, name, shape),
        }
    }
}

/// Which columns of a block's activations are a rank's own.
fn own_cols(block: FfnBlock, shard: &Shard) -> &Range<usize> {
    match block {
        FfnBlock::Dense => &shard.ffn,
        FfnBlock::Expert(_) => &shard.expert,
        FfnBlock::SharedExpert => &shard.shared_expert,
    }
}
