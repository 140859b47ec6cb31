//! Uploads one rank's part of a checkpoint, one matrix after another, while the next are read.

use super::{
    Decoder, Layer, Shares,
    feed_forward::{Experts, FeedForward, Ffn},
};
use crate::{Checkpoint, ModelError, Shard, rope::RopeTables, weights::Weights};
use kernels::{Backend, KernelError, Tensor, WeightPart};

/// How far the weights of a rank are, in bytes as the files have them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Ahead of what is uploaded.
    pub read: u64,
    pub uploaded: u64,
    pub total: u64,
}

/// Brings weights to the device, in the order of `Checkpoint::stacks`.
struct Upload<'a, B> {
    device: &'a B,
    weights: &'a Weights<'a>,
    done: Loaded,
    progress: &'a mut dyn FnMut(Loaded),
}

impl<B: Backend> Upload<'_, B> {
    /// Brings the next weight to the device by `put`.
    fn next<T>(
        &mut self,
        put: impl FnOnce(&B, &[WeightPart<'_>]) -> Result<T, KernelError>,
    ) -> Result<T, ModelError> {
        let Self { weights, done, progress, .. } = self;
        let parts = weights.take(&mut |read| {
            done.read = read;
            progress(*done);
        })?;
        let weight = put(self.device, &parts)?;
        self.sent(&parts);
        Ok(weight)
    }

    fn sent(&mut self, parts: &[WeightPart<'_>]) {
        let Loaded { uploaded, total, .. } = self.done;
        let sent = parts.iter().map(|part| part.bytes() as u64).sum::<u64>();
        let uploaded = (uploaded + sent).min(total);
        let read = self.weights.read_bytes().clamp(uploaded, total);
        self.done = Loaded { read, uploaded, total };
        (self.progress)(self.done);
    }

    /// [1, len]
    fn vector(&self, values: &[f32]) -> Result<Tensor<B>, ModelError> {
        Ok(Tensor::from_host(self.device, values.len(), values)?)
    }
}

impl<B: Backend> Decoder<B> {
    /// Reads what `shard` says and nothing else. `progress` hears of the beginning, of each weight
    /// that is uploaded, and each second while one is waited for.
    ///
    /// # Errors
    /// What the checkpoint or the device refuses.
    pub fn load(
        device: &B,
        checkpoint: &Checkpoint,
        shard: &Shard,
        rope: &RopeTables,
        progress: &mut dyn FnMut(Loaded),
    ) -> Result<Self, ModelError> {
        // Before any memory is taken, and long before the last layer.
        checkpoint.check_scales()?;
        let total = checkpoint.weight_bytes(shard)?;
        checkpoint.read_ahead(shard, |weights| {
            let done = Loaded { total, ..Loaded::default() };
            progress(done);
            let mut upload = Upload { device, weights, done, progress };
            Self::upload(&mut upload, checkpoint, shard, rope)
        })
    }

    fn upload(
        upload: &mut Upload<'_, B>,
        checkpoint: &Checkpoint,
        shard: &Shard,
        rope: &RopeTables,
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        // In the order of `Checkpoint::stacks`: tables first.
        let embedding = upload.next(B::table)?;
        let lm_head = match config.tied {
            true => None,
            false => Some(upload.next(B::table)?),
        };
        let layers = (0..config.layers)
            .map(|index| Layer::load(upload, checkpoint, shard, index))
            .collect::<Result<_, _>>()?;
        let cos_sin = rope.cos_sin(config);
        Ok(Self {
            embedding,
            first_id: shard.vocab.start,
            layers,
            final_norm: upload.vector(&checkpoint.final_norm()?)?,
            lm_head,
            cos_sin: Tensor::exact_from_host(upload.device, config.head_dim, &cos_sin)?,
            heads: shard.heads(),
            norm_eps: config.norm_eps,
            shares: Shares::of_ranks(checkpoint, shard.world_size)?,
            join: shard.join,
        })
    }
}

impl Shares {
    fn of_ranks(checkpoint: &Checkpoint, world_size: usize) -> Result<Self, ModelError> {
        let shards = (0..world_size)
            .map(|rank| checkpoint.shard(rank, world_size))
            .collect::<Result<Vec<_>, _>>()?;
        let each = |cols: fn(&Shard) -> usize| shards.iter().map(cols).collect();
        Ok(Self {
            attention: each(|shard| shard.heads().q * shard.heads().dim),
            hidden: each(|shard| shard.hidden.len()),
            intermediate: each(|shard| shard.ffn.len()),
            expert: each(|shard| shard.expert.len()),
            shared_expert: each(|shard| shard.shared_expert.len()),
            vocab: each(|shard| shard.vocab.len()),
        })
    }
}

impl<B: Backend> Layer<B> {
    fn load(
        upload: &mut Upload<'_, B>,
        checkpoint: &Checkpoint,
        shard: &Shard,
        index: usize,
    ) -> Result<Self, ModelError> {
        let bias = checkpoint.qkv_bias(index, shard)?;
        let qk_norm = match (checkpoint.q_norm(index)?, checkpoint.k_norm(index)?) {
            (Some(q), Some(k)) => Some((upload.vector(&q)?, upload.vector(&k)?)),
            _ => None,
        };
        Ok(Self {
            input_norm: upload.vector(&checkpoint.input_norm(index)?)?,
            qkv: upload.next(B::weight)?,
            qkv_bias: bias.map(|bias| upload.vector(&bias)).transpose()?,
            qk_norm,
            attention_out: upload.next(B::weight)?,
            post_norm: upload.vector(&checkpoint.post_norm(index)?)?,
            feed_forward: FeedForward::load(upload, checkpoint, shard, index)?,
            window: checkpoint.config().window[index],
        })
    }
}

impl<B: Backend> FeedForward<B> {
    fn load(
        upload: &mut Upload<'_, B>,
        checkpoint: &Checkpoint,
        shard: &Shard,
        layer: usize,
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        let stacks = checkpoint.expert_stacks(layer, shard)?;
        let (Some(experts), Some([gate_ups, downs])) = (config.experts_of(layer), stacks) else {
            return Ffn::load(upload).map(Self::Dense);
        };
        let (count, device) = (experts.count, upload.device);
        let router = upload.next(B::table)?;
        let mut gate_up = device.expert_gate_ups(count, &gate_ups)?;
        let mut down = device.experts(count, &downs)?;
        for _ in 0..count {
            upload.next(|device, parts| device.push_expert(&mut gate_up, parts))?;
            upload.next(|device, parts| device.push_expert(&mut down, parts))?;
        }
        let shared = experts.shared.map(|_| Ffn::load(upload)).transpose()?;
        Ok(Self::Experts(Experts { router, gate_up, down, shared }))
    }
}

impl<B: Backend> Ffn<B> {
    fn load(upload: &mut Upload<'_, B>) -> Result<Self, ModelError> {
        Ok(Self { gate_up: upload.next(B::gate_up)?, down: upload.next(B::weight)? })
    }
}
