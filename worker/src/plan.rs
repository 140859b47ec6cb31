//! What a group takes of its devices and how fast it will be, reckoned before anything is loaded.
//!
//! A worker asks it before it loads, and `lockstep plan` for cards that are not here: of a model
//! the configuration is enough.

pub(crate) mod card;
mod hardware;
pub(crate) mod layout;
pub(crate) mod remedies;
mod step_model;
mod streams;
mod times;

use std::{path::PathBuf, time::Duration};

use cuda::CudaConfig;
use kernels::BLOCK_TOKENS;
use model::{Checkpoint, Numbers};
use serde::Serialize;

pub use hardware::{HARDWARE, Hardware};
pub use step_model::{Constants, Prediction, Products, Stage, Streams, step_deadline};
pub use times::StepTime;
pub(crate) use times::Times;

use crate::WorkerError;
use layout::{CARD_STEPS, Layout, Place, Wanted, step_tokens};
use remedies::{OnCards, advice, that_fit};

/// A model on cards that need not be here.
#[derive(Clone, Debug)]
pub struct PlanConfig {
    /// As a group's, or a folder with nothing but a `config.json`.
    pub model: PathBuf,
    /// Each rank has one.
    pub hardware: &'static Hardware,
    pub ranks: usize,
    pub cuda: CudaConfig,
    /// Plans for a checkpoint of the model that stores its matrices so.
    pub numbers: Option<Numbers>,
    /// Tokens of prompt and answer together. Default: the model's, as far as memory allows.
    pub context_max: Option<usize>,
    /// Tokens in one step, at most. Default: as a group's on cards.
    pub step_tokens_max: Option<usize>,
    /// Sequences that run at once.
    pub sequences_max: usize,
}

/// What comes of a [`PlanConfig`].
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub parameters: u64,
    /// Of the whole model.
    pub kv_bytes_per_token: u64,
    pub ranks: Vec<RankBytes>,
    /// What the KV cache has room for beside weights and scratch.
    pub kv_tokens: usize,
    pub fits: bool,
    /// Steps in which each of `batch` sequences gets a token.
    pub decode: Vec<StepTime>,
    /// Whole prompts.
    pub prefill: Vec<StepTime>,
    /// Of the model, for people.
    #[serde(skip)]
    pub name: String,
    #[serde(skip)]
    pub context_max: usize,
    #[serde(skip)]
    pub step_tokens_max: usize,
    /// Each rank's arithmetic, for people.
    #[serde(skip)]
    pub memory: Vec<String>,
    /// Where it does not fit: what would.
    #[serde(skip)]
    pub advice: Option<String>,
    /// When a step is taken for hung.
    #[serde(skip)]
    pub step_deadline: Duration,
}

/// One rank's memory.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct RankBytes {
    pub weights_bytes: u64,
    pub scratch_bytes: u64,
    /// Of the KV pool that is asked for, or all that fits.
    pub kv_bytes: u64,
}

/// Reckons memory and step times. Reads no weights and opens no device.
///
/// # Errors
/// `Config` for a size of 0; `Model` for what cannot be read or split so far.
pub fn plan(config: &PlanConfig) -> Result<Plan, WorkerError> {
    check(config)?;
    let opened = Checkpoint::open_or_outline(&config.model)?;
    let checkpoint = &match config.numbers {
        Some(numbers) => opened.stored_as(numbers),
        None => opened,
    };
    let (model, cuda, hardware) = (checkpoint.config(), config.cuda, config.hardware);
    let with_steps = |step_tokens_max| OnCards {
        checkpoint,
        cuda,
        card: hardware.name,
        fp8_products: hardware.fp8_products(),
        ranks: config.ranks,
        card_bytes: card::usable_when_idle(hardware.memory_bytes),
        wanted: Wanted {
            context_max: config.context_max,
            kv_memory: None,
            model_context: model.context_max,
            step_tokens_max,
            sequences_max: config.sequences_max,
            kv_share: card::KV_SHARE,
        },
    };
    let steps = config.step_tokens_max.map_or(CARD_STEPS.to_vec(), |tokens| vec![tokens]);
    let on_cards = with_steps(step_tokens(&steps, |tokens| with_steps(tokens).lay_out())?);
    let (layout, places, shards) = (on_cards.lay_out()?, on_cards.places(), on_cards.shards()?);
    let fits = layout.overfull(&places).is_none();
    let times = Times::new(hardware, cuda, checkpoint, &shards)?;
    let kv_tokens = layout.blocks_fit as usize * BLOCK_TOKENS;
    let (decode, prefill) = match fits {
        true => times.tables(&layout.options, kv_tokens),
        false => (Vec::new(), Vec::new()),
    };
    let whole = checkpoint.shard(0, 1)?.heads();
    let block = (model.layers * cuda.kv_format.block_bytes(whole)) as u64;
    Ok(Plan {
        parameters: checkpoint.parameters()?,
        kv_bytes_per_token: block / BLOCK_TOKENS as u64,
        ranks: layout.ranks.iter().map(RankBytes::from).collect(),
        kv_tokens,
        fits,
        decode,
        prefill,
        name: checkpoint.name().to_owned(),
        context_max: layout.options.context_max,
        step_tokens_max: layout.options.step_tokens_max,
        memory: places.iter().map(|place| told(&layout, place)).collect(),
        advice: (!fits).then(|| advice(&that_fit(on_cards))),
        step_deadline: step_deadline(&times.longest_step(&layout.options)),
    })
}

fn check(config: &PlanConfig) -> Result<(), WorkerError> {
    let bounds = [
        ("ranks", config.ranks),
        ("tokens of context", config.context_max.unwrap_or(1)),
        ("tokens in a step", config.step_tokens_max.unwrap_or(1)),
        ("sequences", config.sequences_max),
    ];
    match bounds.iter().find(|(_, value)| *value == 0) {
        Some((what, _)) => Err(WorkerError::Config(format!("0 {what}: at least 1 is needed"))),
        None => Ok(()),
    }
}

impl From<&layout::RankMemory> for RankBytes {
    fn from(rank: &layout::RankMemory) -> Self {
        let layout::RankMemory { weights, scratch, kv } = *rank;
        Self { weights_bytes: weights, scratch_bytes: scratch, kv_bytes: kv }
    }
}

/// What the ranks of a device take, and what it has.
pub(crate) fn told(layout: &Layout, place: &Place) -> String {
    let ranks = &layout.ranks[place.ranks.clone()];
    let sum =
        |part: fn(&layout::RankMemory) -> u64| ranks.iter().map(part).fold(0, u64::saturating_add);
    let (weights, scratch, kv) = (sum(|r| r.weights), sum(|r| r.scratch), sum(|r| r.kv));
    let who = match place.ranks.len() {
        1 => format!("rank {}", place.ranks.start),
        _ => format!("ranks {} to {}", place.ranks.start, place.ranks.end - 1),
    };
    let tokens = layout.options.blocks * BLOCK_TOKENS;
    format!(
        "{who} on {}: weights {} + KV cache {} ({tokens} tokens of {} bytes) + scratch {} = {}, \
         available are {} ({})",
        place.name,
        human(weights),
        human(kv),
        kv / (tokens as u64).max(1),
        human(scratch),
        human(layout.taken(place)),
        human(place.bytes),
        place.source,
    )
}

/// Bytes for people: `1.5 GB`, `98 MB`.
pub(crate) fn human(bytes: u64) -> String {
    match bytes {
        1_000_000_000.. => format!("{:.1} GB", bytes as f64 / 1e9),
        1_000_000.. => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.0} kB", bytes as f64 / 1e3),
    }
}

#[cfg(test)]
mod tests;
