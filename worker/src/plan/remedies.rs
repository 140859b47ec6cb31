//! What would fit where something does not.

use cuda::{CudaConfig, KvFormat, WeightFormat};
use kernels::{BLOCK_TOKENS, Join};
use model::{Checkpoint, ModelError, Numbers, Shard};

use super::{
    card,
    layout::{Layout, Place, Wanted, lay_out},
};

/// A model on equal cards, one for each rank.
#[derive(Clone, Copy)]
pub(crate) struct OnCards<'a> {
    pub checkpoint: &'a Checkpoint,
    pub cuda: CudaConfig,
    /// For people.
    pub card: &'a str,
    pub fp8_products: bool,
    pub ranks: usize,
    /// That a rank can use.
    pub card_bytes: u64,
    pub wanted: Wanted,
}

impl OnCards<'_> {
    pub fn shards(&self) -> Result<Vec<Shard>, ModelError> {
        let Self { checkpoint, ranks, .. } = *self;
        let shard = |rank| {
            let shard = checkpoint.shard(rank, ranks)?;
            Ok(shard.joined_by(Join::Sum, checkpoint.config()))
        };
        (0..ranks).map(shard).collect()
    }

    pub fn places(&self) -> Vec<Place> {
        let place = |rank| Place {
            ranks: rank..rank + 1,
            name: self.card.to_owned(),
            hardware: None,
            fp8_products: self.fp8_products,
            bytes: self.card_bytes,
            source: "less 1.6 GB for the driver".into(),
        };
        (0..self.ranks).map(place).collect()
    }

    /// # Errors
    /// More ranks than the model can be split over.
    pub fn lay_out(&self) -> Result<Layout, ModelError> {
        let Self { checkpoint, cuda, fp8_products, wanted, .. } = *self;
        let shards = self.shards()?;
        let cost =
            |shard| card::cost(cuda, fp8_products, checkpoint, shard, wanted.step_tokens_max);
        let costs = shards.iter().map(cost).collect::<Result<Vec<_>, _>>()?;
        Ok(lay_out(&wanted, &self.places(), &costs, |rank, options| {
            card::scratch(cuda, checkpoint.config(), &shards[rank], &costs[rank], options)
        }))
    }

    /// The tokens that the KV pool has room for; `None` where it does not fit.
    fn tokens(&self) -> Option<usize> {
        let layout = self.lay_out().ok()?;
        let fits = layout.overfull(&self.places()).is_none();
        fits.then_some(layout.blocks_fit as usize * BLOCK_TOKENS)
    }
}

/// Changes that would make it fit, each alone, with what the KV cache then holds.
pub(crate) fn that_fit(asked: OnCards<'_>) -> Vec<String> {
    let OnCards { checkpoint, cuda, wanted, ranks, .. } = asked;
    let integers = checkpoint.stored_as(Numbers::INT4);
    let fp8_weights = CudaConfig { weights: WeightFormat::Fp8, ..cuda };
    let fp8_kv = CudaConfig { kv_format: KvFormat::Fp8, ..cuda };
    let mut tries = vec![
        ("--weights fp8".to_owned(), OnCards { cuda: fp8_weights, ..asked }),
        ("the model's int4 checkpoint".to_owned(), OnCards { checkpoint: &integers, ..asked }),
        ("--kv-cache fp8".to_owned(), OnCards { cuda: fp8_kv, ..asked }),
    ];
    tries.extend(
        [2, 4, 8].iter().filter(|more| **more > ranks).map(|&ranks| {
            (format!("--tp {ranks} on {ranks} such cards"), OnCards { ranks, ..asked })
        }),
    );
    let told = |(what, tried): (String, OnCards<'_>)| {
        tried.tokens().map(|tokens| format!("{what} ({tokens} tokens of KV cache)"))
    };
    let mut fitting: Vec<String> = tries.into_iter().filter_map(told).collect();
    if wanted.context_max.is_some() {
        let shorter = Wanted { context_max: None, kv_memory: None, ..wanted };
        let shorter = OnCards { wanted: shorter, ..asked };
        if let Some(layout) = shorter.tokens().and_then(|_| shorter.lay_out().ok()) {
            fitting.push(format!("--context {}", layout.options.context_max));
        }
    }
    fitting
}

/// The end of a refusal.
pub(crate) fn advice(fitting: &[String]) -> String {
    match fitting {
        [] => "neither fp8, int4, 8 cards nor a shorter context would fit: choose a smaller model \
               or larger cards"
            .into(),
        _ => format!("would fit: {}", fitting.join("; ")),
    }
}
