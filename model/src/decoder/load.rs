//! Uploads one rank's part of a checkpoint, one matrix in memory at a time.

use super::{
    Decoder, Layer, Shares,
    feed_forward::{Experts, FeedForward, Ffn},
};
use crate::{Checkpoint, FfnBlock, ModelError, Shard, rope::RopeTables};
use kernels::{Backend, Tensor, WeightPart};

/// Counts the bytes of weights on their way to the device.
struct Upload<'a, B> {
    device: &'a B,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<B: Backend> Upload<'_, B> {
    fn weight(&mut self, parts: Vec<WeightPart<'static>>) -> Result<B::Weight, ModelError> {
        let weight = self.device.weight(&parts)?;
        self.sent(&parts);
        Ok(weight)
    }

    fn gate_up(&mut self, parts: Vec<WeightPart<'static>>) -> Result<B::Weight, ModelError> {
        let weight = self.device.gate_up(&parts)?;
        self.sent(&parts);
        Ok(weight)
    }

    fn table(&mut self, parts: Vec<WeightPart<'static>>) -> Result<B::Weight, ModelError> {
        let table = self.device.table(&parts)?;
        self.sent(&parts);
        Ok(table)
    }

    fn push_expert(
        &mut self,
        to: &mut B::Experts,
        parts: Vec<WeightPart<'static>>,
    ) -> Result<(), ModelError> {
        self.device.push_expert(to, &parts)?;
        self.sent(&parts);
        Ok(())
    }

    fn sent(&mut self, parts: &[WeightPart<'_>]) {
        self.done += parts.iter().map(|part| part.bytes() as u64).sum::<u64>();
        (self.progress)(self.done.min(self.total), self.total);
    }

    /// [1, len]
    fn vector(&self, values: &[f32]) -> Result<Tensor<B>, ModelError> {
        Ok(Tensor::from_host(self.device, values.len(), values)?)
    }
}

impl<B: Backend> Decoder<B> {
    /// Reads what `shard` says and nothing else. `progress` hears of bytes done and in all.
    ///
    /// # Errors
    /// What the checkpoint or the device refuses.
    pub fn load(
        device: &B,
        checkpoint: &Checkpoint,
        shard: &Shard,
        rope: &RopeTables,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, ModelError> {
        // Before any memory is taken, and long before the last layer.
        checkpoint.check_scales()?;
        let config = checkpoint.config();
        let total = checkpoint.weight_bytes(shard)?;
        let mut upload = Upload { device, done: 0, total, progress };
        let embedding = upload.table(checkpoint.embed(shard)?)?;
        let layers = (0..config.layers)
            .map(|index| Layer::load(&mut upload, checkpoint, shard, index))
            .collect::<Result<_, _>>()?;
        let lm_head = match config.tied {
            true => None,
            false => Some(upload.table(checkpoint.lm_head(shard)?)?),
        };
        Ok(Self {
            embedding,
            first_id: shard.vocab.start,
            layers,
            final_norm: upload.vector(&checkpoint.final_norm()?)?,
            lm_head,
            cos_sin: Tensor::exact_from_host(device, config.head_dim, &rope.cos_sin(config))?,
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
            qkv: upload.weight(checkpoint.qkv(index, shard)?)?,
            qkv_bias: bias.map(|bias| upload.vector(&bias)).transpose()?,
            qk_norm,
            attention_out: upload.weight(checkpoint.attn_out(index, shard)?)?,
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
        let Some(experts) = config.experts_of(layer) else {
            return Ffn::load(upload, checkpoint, shard, (layer, FfnBlock::Dense)).map(Self::Dense);
        };
        let (hidden, width) = (config.hidden, experts.intermediate);
        let (count, device) = (experts.count, upload.device);
        let router = upload.table(checkpoint.router(layer)?)?;
        let mut gate_up = device.experts([count, 2 * shard.expert.len(), hidden])?;
        let inputs = shard.gathered(shard.expert.len(), width).whole;
        let mut down = device.experts([count, shard.hidden.len(), inputs])?;
        for expert in (0..count).map(FfnBlock::Expert) {
            upload.push_expert(&mut gate_up, checkpoint.gate_up(layer, expert, shard)?)?;
            upload.push_expert(&mut down, checkpoint.down(layer, expert, shard)?)?;
        }
        let shared = |_| Ffn::load(upload, checkpoint, shard, (layer, FfnBlock::SharedExpert));
        let shared = experts.shared.map(shared).transpose()?;
        Ok(Self::Experts(Experts { router, gate_up, down, shared }))
    }
}

impl<B: Backend> Ffn<B> {
    fn load(
        upload: &mut Upload<'_, B>,
        checkpoint: &Checkpoint,
        shard: &Shard,
        (layer, block): (usize, FfnBlock),
    ) -> Result<Self, ModelError> {
        Ok(Self {
            gate_up: upload.gate_up(checkpoint.gate_up(layer, block, shard)?)?,
            down: upload.weight(checkpoint.down(layer, block, shard)?)?,
        })
    }
}
