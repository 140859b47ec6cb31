//! What the ranks of a group compute on. The one place that chooses a backend; everything else is
//! generic over it.

use collective::{Collective, HostCollective, Staged};
use cpu::{Cpu, CpuConfig};
use kernels::{Backend, Heads, Join};
use model::{Checkpoint, ModelError, Shard};

use super::{
    Device,
    memory::{Available, available},
};
use crate::WorkerError;

/// The devices of a group's ranks.
pub(super) trait Devices: Clone + Send + Sync + 'static {
    type Backend: Backend;
    /// How ranks exchange tensors.
    type Link<H: HostCollective>: Collective<Self::Backend>;

    /// Opens the device of one rank.
    fn open(&self, rank: usize) -> Result<Self::Backend, WorkerError>;
    /// Meets the other ranks, which `host` reaches; all do so at once.
    fn link<H: HostCollective>(
        &self,
        device: &Self::Backend,
        host: H,
    ) -> Result<Self::Link<H>, WorkerError>;
    /// Whether a step leaves the host free to plan the next one. Where both compute on the same
    /// cores, one plan at a time is faster.
    fn compute_beside_the_host(&self) -> bool;
    /// Bytes of one KV block of one layer.
    fn kv_block_bytes(&self, heads: Heads) -> Result<usize, WorkerError>;
    /// As their `Backend::join`.
    fn join(&self) -> Join;
    /// Bytes of a rank's weights once they are on the device.
    fn weight_bytes(&self, checkpoint: &Checkpoint, shard: &Shard) -> Result<u64, WorkerError>;
    /// Memory that all ranks together may take; `None` where it is unknown.
    fn available(&self) -> Result<Option<Available>, WorkerError>;
    /// How much of what is left the KV pool takes by default.
    fn kv_share(&self) -> KvShare;
    /// For people.
    fn describe(&self) -> Result<String, WorkerError>;
}

/// The default KV pool's part of the memory that weights and scratch leave.
#[derive(Clone, Copy, Debug)]
pub(super) struct KvShare {
    /// One of so many parts.
    pub part: u64,
    /// Contexts that are enough.
    pub contexts_max: u64,
}

/// Work that is generic over the devices, run once they are chosen.
pub(super) trait Task {
    type Out;
    fn on<D: Devices>(self, devices: D) -> Result<Self::Out, WorkerError>;
}

/// Chooses the devices of `ranks` ranks.
pub(super) fn on_devices<T: Task>(
    device: Device,
    ranks: usize,
    cpu: CpuConfig,
    task: T,
) -> Result<T::Out, WorkerError> {
    match device {
        Device::Cpu => task.on(cpu),
        #[cfg(feature = "cuda")]
        Device::Cuda { first, config, share } => {
            task.on(cuda::Cards::find((first, share), config, ranks)?)
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

    fn open(&self, _rank: usize) -> Result<Cpu, WorkerError> {
        Ok(Cpu::new(*self).map_err(ModelError::from)?)
    }

    fn link<H: HostCollective>(&self, _device: &Cpu, host: H) -> Result<Staged<H>, WorkerError> {
        Ok(Staged::new(host))
    }

    fn compute_beside_the_host(&self) -> bool {
        false
    }

    fn join(&self) -> Join {
        Join::Gather
    }

    fn kv_block_bytes(&self, heads: Heads) -> Result<usize, WorkerError> {
        // Only asked for sizes: it never computes.
        let device = Cpu::new(CpuConfig { threads: 1, ..*self }).map_err(ModelError::from)?;
        Ok(device.kv_block_bytes(heads))
    }

    fn weight_bytes(&self, checkpoint: &Checkpoint, shard: &Shard) -> Result<u64, WorkerError> {
        Ok(checkpoint.weight_bytes(shard)?)
    }

    fn available(&self) -> Result<Option<Available>, WorkerError> {
        Ok(available())
    }

    fn kv_share(&self) -> KvShare {
        KvShare { part: 4, contexts_max: 16 }
    }

    fn describe(&self) -> Result<String, WorkerError> {
        Ok("cpu".into())
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::{
        Available, Checkpoint, Devices, Heads, HostCollective, Join, KvShare, ModelError, Shard,
        WorkerError,
    };
    use collective::PeerMemory;
    use cuda::{Cuda, CudaConfig, Driver, Gpu, GpuConfig, PeerConfig, WeightFormat};
    use kernels::KernelError;
    use model::Stack;

    /// The card of each rank: one each from the first on, or the first for all.
    #[derive(Clone, Debug)]
    pub struct Cards {
        of_ranks: Vec<usize>,
        config: CudaConfig,
    }

    impl Cards {
        /// Where `share` says so, ranks share the first card if there are fewer cards than ranks.
        pub fn find(
            (first, share): (usize, bool),
            config: CudaConfig,
            ranks: usize,
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
            Ok(Self { of_ranks: (0..ranks).map(card).collect(), config })
        }

        fn card(&self, rank: usize) -> Result<Gpu, WorkerError> {
            let none = || KernelError::Device(format!("rank {rank} has no device"));
            let card = self.of_ranks.get(rank).copied().ok_or_else(none);
            let opened = card.and_then(|card| Gpu::open(GpuConfig::new(card)));
            Ok(opened.map_err(ModelError::from)?)
        }

        /// The distinct cards, by their first ranks.
        fn firsts(&self) -> impl Iterator<Item = usize> {
            let cards = &self.of_ranks;
            let spread = cards.first() != cards.last();
            0..if spread { cards.len() } else { cards.len().min(1) }
        }
    }

    impl Devices for Cards {
        type Backend = Cuda<Gpu>;
        type Link<H: HostCollective> = PeerMemory<Gpu, H>;

        fn open(&self, rank: usize) -> Result<Cuda<Gpu>, WorkerError> {
            Ok(Cuda::new(self.card(rank)?, self.config))
        }

        fn link<H: HostCollective>(
            &self,
            device: &Cuda<Gpu>,
            host: H,
        ) -> Result<PeerMemory<Gpu, H>, WorkerError> {
            let limit = GpuConfig::new(0).wait_limit;
            let config = PeerConfig::new(host.world_size(), limit);
            Ok(PeerMemory::new(device, host, config).map_err(ModelError::from)?)
        }

        fn compute_beside_the_host(&self) -> bool {
            true
        }

        fn join(&self) -> Join {
            Join::Sum
        }

        fn kv_block_bytes(&self, heads: Heads) -> Result<usize, WorkerError> {
            Ok(self.config.kv_format.block_bytes(heads))
        }

        fn weight_bytes(&self, checkpoint: &Checkpoint, shard: &Shard) -> Result<u64, WorkerError> {
            let bytes = |stack: Stack| match stack.is_table {
                true => WeightFormat::table_bytes(&stack.parts),
                false => self.config.weights.bytes(&stack.parts),
            };
            Ok(checkpoint.stacks(shard)?.into_iter().map(bytes).sum())
        }

        fn available(&self) -> Result<Option<Available>, WorkerError> {
            // Ranks take about the same, so the fullest card bounds them all.
            let (mut least, mut cards) = (u64::MAX, 0);
            for rank in self.firsts() {
                let free = self.card(rank)?.free_bytes().map_err(ModelError::from)?;
                (least, cards) = (least.min(free), cards + 1);
            }
            // The rest is for the driver, workspaces and fragments.
            let bytes = least / 10 * 9 * cards;
            Ok(Some(Available { bytes, source: "90 % of the devices' free memory" }))
        }

        fn kv_share(&self) -> KvShare {
            KvShare { part: 1, contexts_max: u64::MAX }
        }

        fn describe(&self) -> Result<String, WorkerError> {
            let name = |rank| -> Result<String, WorkerError> {
                Ok(format!("cuda:{} {}", self.of_ranks[rank], self.card(rank)?.facts().name))
            };
            Ok(self.firsts().map(name).collect::<Result<Vec<_>, _>>()?.join(", "))
        }
    }
}
