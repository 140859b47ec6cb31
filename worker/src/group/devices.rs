//! What the ranks of a group compute on. The one place that chooses a backend; everything else is
//! generic over it.

use std::time::Duration;

use collective::{Collective, HostCollective, Staged};
use cpu::{Cpu, CpuConfig};
use kernels::{Backend, Join, LOGIT_ROWS_MAX};
use model::{Checkpoint, DecoderConfig, ModelError, RunnerOptions, Shard};

use super::{
    Device,
    memory::{Available, available},
};
use crate::{
    WorkerError,
    plan::layout::{KvShare, Place, RankCost, Wanted},
};

/// The devices of a group's ranks.
pub(super) trait Devices: Clone + Send + Sync + 'static {
    type Backend: Backend;
    /// How ranks exchange tensors.
    type Link<H: HostCollective>: Collective<Self::Backend>;

    /// Opens the device of one rank, which a step may keep busy for as long as `deadline`.
    fn open(&self, rank: usize, deadline: Option<Duration>) -> Result<Self::Backend, WorkerError>;
    /// Meets the other ranks, which `host` reaches; all do so at once. Later no rank waits longer
    /// than `deadline` for another. No sum is of more than so many elements.
    fn link<H: HostCollective>(
        &self,
        device: &Self::Backend,
        host: H,
        deadline: Option<Duration>,
        sum_elements_max: usize,
    ) -> Result<Self::Link<H>, WorkerError>;
    /// Whether a step leaves the host free to plan the next one. Where both compute on the same
    /// cores, one plan at a time is faster.
    fn compute_beside_the_host(&self) -> bool;
    /// As their `Backend::join`.
    fn join(&self) -> Join;
    /// What a rank holds of a model, in the place where it is.
    fn cost(
        &self,
        checkpoint: &Checkpoint,
        shard: &Shard,
        place: &Place,
        step_tokens_max: usize,
    ) -> Result<RankCost, WorkerError>;
    /// Bytes that a rank takes beside weights and KV cache.
    fn scratch(
        &self,
        config: &DecoderConfig,
        shard: &Shard,
        cost: &RankCost,
        options: &RunnerOptions,
    ) -> u64;
    /// The memory that the ranks take from.
    fn places(&self, ranks: usize) -> Result<Vec<Place>, WorkerError>;
    /// Tokens of a step where nobody says, the best first.
    fn step_tokens(&self) -> &'static [usize];
    /// How much of what is left the KV pool takes by default.
    fn kv_share(&self) -> KvShare;
    /// What to do about a group that does not fit.
    fn advice(&self, checkpoint: &Checkpoint, wanted: &Wanted, places: &[Place]) -> String;
    /// When a step is taken for hung, where that is known.
    fn step_deadline(
        &self,
        checkpoint: &Checkpoint,
        shards: &[Shard],
        places: &[Place],
        options: &RunnerOptions,
    ) -> Result<Option<Duration>, WorkerError>;
}

/// Work that is generic over the devices, run once they are chosen.
pub(super) trait Task {
    type Out;
    fn on<D: Devices>(self, devices: D) -> Result<Self::Out, WorkerError>;
}

/// Chooses the devices of `ranks` ranks.
pub(super) fn on_devices<T: Task>(
    device: &Device,
    ranks: usize,
    cpu: CpuConfig,
    task: T,
) -> Result<T::Out, WorkerError> {
    match device {
        Device::Cpu => task.on(cpu),
        #[cfg(feature = "cuda")]
        Device::Cuda { first, config, share, nccl } => {
            task.on(cuda::OwnCards::find((*first, *share), *config, ranks, nccl)?)
        }
        #[cfg(not(feature = "cuda"))]
        Device::Cuda { .. } => {
            let ranks = if ranks == 1 { "1 rank".to_owned() } else { format!("{ranks} ranks") };
            Err(WorkerError::Config(format!(
                "this build has no CUDA backend for {ranks}; build with `cargo build --release \
                 --features cuda`, or use --device cpu"
            )))
        }
    }
}

/// Ranks on the CPU share the machine.
impl Devices for CpuConfig {
    type Backend = Cpu;
    type Link<H: HostCollective> = Staged<H>;

    fn open(&self, _rank: usize, _deadline: Option<Duration>) -> Result<Cpu, WorkerError> {
        Ok(Cpu::new(*self).map_err(ModelError::from)?)
    }

    fn link<H: HostCollective>(
        &self,
        _device: &Cpu,
        host: H,
        _deadline: Option<Duration>,
        _sum_elements_max: usize,
    ) -> Result<Staged<H>, WorkerError> {
        Ok(Staged::new(host))
    }

    fn compute_beside_the_host(&self) -> bool {
        false
    }

    fn join(&self) -> Join {
        Join::Gather
    }

    fn cost(
        &self,
        checkpoint: &Checkpoint,
        shard: &Shard,
        _place: &Place,
        _step_tokens_max: usize,
    ) -> Result<RankCost, WorkerError> {
        // Only asked for sizes: it never computes.
        let device = Cpu::new(CpuConfig { threads: 1, ..*self }).map_err(ModelError::from)?;
        let block = device.kv_block_bytes(shard.heads()) * checkpoint.config().layers;
        let weights = checkpoint.weight_bytes(shard)?;
        Ok(RankCost { weights, block: block as u64, products: 0 })
    }

    fn scratch(
        &self,
        config: &DecoderConfig,
        shard: &Shard,
        _cost: &RankCost,
        options: &RunnerOptions,
    ) -> u64 {
        model::elements(config, shard, options, LOGIT_ROWS_MAX).bytes(size_of::<f32>())
    }

    fn places(&self, ranks: usize) -> Result<Vec<Place>, WorkerError> {
        let available = available().unwrap_or(Available { bytes: u64::MAX, source: "unknown" });
        let (bytes, source) = (available.bytes, available.source.to_owned());
        let (name, hardware, fp8_products) = ("cpu".to_owned(), None, false);
        Ok(vec![Place { ranks: 0..ranks, name, hardware, fp8_products, bytes, source }])
    }

    fn step_tokens(&self) -> &'static [usize] {
        &[512]
    }

    fn kv_share(&self) -> KvShare {
        KvShare { part: 4, contexts_max: 16 }
    }

    fn advice(&self, _checkpoint: &Checkpoint, _wanted: &Wanted, _places: &[Place]) -> String {
        "lower --kv-memory or --context, or choose a smaller model".into()
    }

    fn step_deadline(
        &self,
        _checkpoint: &Checkpoint,
        _shards: &[Shard],
        _places: &[Place],
        _options: &RunnerOptions,
    ) -> Result<Option<Duration>, WorkerError> {
        // A machine's speed is not known before it has run.
        Ok(None)
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::{
        Checkpoint, DecoderConfig, Devices, Duration, HostCollective, Join, KvShare, ModelError,
        Place, RankCost, RunnerOptions, Shard, Wanted, WorkerError,
    };
    use crate::{
        NcclUse,
        plan::{
            Hardware, Times, card, human,
            layout::CARD_STEPS,
            remedies::{OnCards, advice, that_fit},
            step_deadline,
        },
    };
    use collective::{Cards, CardsConfig};
    use cuda::{Cuda, CudaConfig, Driver, Element, Gpu, GpuConfig, NCCL_LIBRARY, PeerConfig};
    use kernels::KernelError;
    use std::ffi::OsString;

    /// The card of each rank: one each from the first on, or the first for all.
    #[derive(Clone, Debug)]
    pub struct OwnCards {
        of_ranks: Vec<usize>,
        config: CudaConfig,
        /// NCCL's library, where ranks may exchange by it.
        nccl: Option<OsString>,
    }

    impl OwnCards {
        /// Where `share` says so, ranks share the first card if there are fewer cards than ranks.
        pub fn find(
            (first, share): (usize, bool),
            config: CudaConfig,
            ranks: usize,
            nccl: &NcclUse,
        ) -> Result<Self, WorkerError> {
            let count = Gpu::count().map_err(ModelError::from)?;
            let spread = first.saturating_add(ranks) <= count;
            if !spread && ranks > 1 && !share {
                let from = count.saturating_sub(first);
                return Err(WorkerError::Config(format!(
                    "{ranks} ranks and {from} cards from cuda:{first} on: each rank takes a card \
                     of its own; lower --tp, choose other cards, or let the ranks share one with \
                     --share-cards, which is slow and for tests"
                )));
            }
            let card = |rank| if spread { first + rank } else { first };
            let nccl = match nccl {
                // It refuses a second rank on a card.
                _ if !spread => None,
                NcclUse::Off => None,
                NcclUse::Auto => Some(NCCL_LIBRARY.into()),
                NcclUse::At(path) => Some(path.into()),
            };
            let overlap = config.overlap && (spread || ranks == 1);
            let config = CudaConfig { overlap, ..config };
            Ok(Self { of_ranks: (0..ranks).map(card).collect(), config, nccl })
        }

        fn card(&self, rank: usize) -> Result<Gpu, WorkerError> {
            self.opened(rank, |config| config)
        }

        fn opened(
            &self,
            rank: usize,
            with: impl FnOnce(GpuConfig) -> GpuConfig,
        ) -> Result<Gpu, WorkerError> {
            let none = || KernelError::Device(format!("rank {rank} has no device"));
            let card = self.of_ranks.get(rank).copied().ok_or_else(none);
            let opened = card.and_then(|card| Gpu::open(with(GpuConfig::new(card))));
            Ok(opened.map_err(ModelError::from)?)
        }
    }

    impl Devices for OwnCards {
        type Backend = Cuda<Gpu>;
        type Link<H: HostCollective> = Cards<Gpu, H>;

        fn open(&self, rank: usize, deadline: Option<Duration>) -> Result<Cuda<Gpu>, WorkerError> {
            let card = self.opened(rank, |config| GpuConfig {
                wait_limit: deadline.unwrap_or(config.wait_limit),
                first_wait_limit: deadline.unwrap_or_default().max(config.wait_limit),
                ..config
            });
            Ok(Cuda::new(card?, self.config))
        }

        fn link<H: HostCollective>(
            &self,
            device: &Cuda<Gpu>,
            host: H,
            deadline: Option<Duration>,
            sum_elements_max: usize,
        ) -> Result<Cards<Gpu, H>, WorkerError> {
            let usual = GpuConfig::new(0).wait_limit;
            // Before the host's own patience ends: it knows less of the reason.
            let limit = deadline.unwrap_or(usual) / 4 * 3;
            let (rank, ranks) = (host.rank(), host.world_size());
            let peers =
                PeerConfig { first_limit: limit.max(usual), ..PeerConfig::new(ranks, limit) };
            let config = CardsConfig {
                nccl: self.nccl.clone(),
                sum_bytes_max: sum_elements_max.saturating_mul(Element::Bf16.bytes()),
                ..CardsConfig::peers(peers)
            };
            let cards = Cards::new(device, host, &config).map_err(ModelError::from)?;
            // The other ranks would say the same.
            if let Some(warning) = cards.warning().filter(|_| rank == 0) {
                tracing::warn!("{warning}");
            }
            Ok(cards)
        }

        fn compute_beside_the_host(&self) -> bool {
            true
        }

        fn join(&self) -> Join {
            Join::Sum
        }

        fn cost(
            &self,
            checkpoint: &Checkpoint,
            shard: &Shard,
            place: &Place,
            step_tokens_max: usize,
        ) -> Result<RankCost, WorkerError> {
            let fp8_products = place.fp8_products;
            Ok(card::cost(self.config, fp8_products, checkpoint, shard, step_tokens_max)?)
        }

        fn scratch(
            &self,
            config: &DecoderConfig,
            shard: &Shard,
            cost: &RankCost,
            options: &RunnerOptions,
        ) -> u64 {
            card::scratch(self.config, config, shard, cost, options)
        }

        fn places(&self, ranks: usize) -> Result<Vec<Place>, WorkerError> {
            // Ranks have cards of their own, or all have one.
            let shared = self.of_ranks.first() == self.of_ranks.last();
            let each = if shared { ranks } else { 1 };
            let place = |first: usize| -> Result<Place, WorkerError> {
                let card = self.card(first)?;
                let free = card.free_bytes().map_err(ModelError::from)?;
                let facts = card.facts();
                Ok(Place {
                    ranks: first..first + each,
                    name: format!("cuda:{} {}", self.of_ranks[first], facts.name),
                    hardware: Hardware::of_card(&facts.name, facts.memory_bytes),
                    fp8_products: facts.fp8_products(),
                    bytes: card::usable(free, each),
                    source: format!("of {} free, less 1.1 GB a rank for the driver", human(free)),
                })
            };
            (0..ranks).step_by(each).map(place).collect()
        }

        fn step_tokens(&self) -> &'static [usize] {
            CARD_STEPS
        }

        fn kv_share(&self) -> KvShare {
            card::KV_SHARE
        }

        fn advice(&self, checkpoint: &Checkpoint, wanted: &Wanted, places: &[Place]) -> String {
            let Some(place) = places.first() else { return advice(&[]) };
            let each = place.ranks.len().max(1);
            advice(&that_fit(OnCards {
                checkpoint,
                cuda: self.config,
                card: &place.name,
                fp8_products: place.fp8_products,
                ranks: self.of_ranks.len(),
                card_bytes: place.bytes / each as u64,
                wanted: *wanted,
            }))
        }

        fn step_deadline(
            &self,
            checkpoint: &Checkpoint,
            shards: &[Shard],
            places: &[Place],
            options: &RunnerOptions,
        ) -> Result<Option<Duration>, WorkerError> {
            let Some(hardware) = places.iter().find_map(|place| place.hardware) else {
                return Ok(None);
            };
            let times = Times::new(hardware, self.config, checkpoint, shards)?;
            Ok(Some(step_deadline(&times.longest_step(options))))
        }
    }
}
