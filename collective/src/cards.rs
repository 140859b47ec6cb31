//! Ranks on cards exchange without the host: by each other's memory where every card reaches every
//! other one, by NCCL where they do not and for sums of many bytes.
//!
//! The host's exchange is needed to begin: every rank hears what each has found, and all choose by
//! the same rule. Where cards reach each other, trouble with NCCL costs speed and a warning; where
//! they do not, the group is refused.

use super::{Collective, CollectiveError, HostCollective};
use cuda::{
    Communicator, Cuda, Driver, Element, Nccl, NcclLimits, NcclPlace, PeerConfig, PeerRegion,
    Peers, UniqueId,
};
use kernels::{AddNorm, Backend, KernelError, Tensor};
use std::{ffi::OsString, iter, time::Duration};

/// Before the host's own patience ends, which knows less of the reason.
const MEET_LIMIT: Duration = Duration::from_secs(20);

/// How ranks on cards exchange; the same on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CardsConfig {
    pub peers: PeerConfig,
    /// The name or path of NCCL's library; `None`: it is not used.
    pub nccl: Option<OsString>,
    /// Sums of more bytes go by NCCL, where cards reach each other.
    pub crossover_bytes: usize,
    /// The largest sum to come: NCCL is opened where something would go by it.
    pub sum_bytes_max: usize,
}

impl CardsConfig {
    /// Others have measured NCCL to be faster from 4 to 8 MiB on; beyond 8 MiB a sum by peer memory
    /// is cut into several. We have measured neither.
    pub const CROSSOVER_BYTES: usize = 8 << 20;

    /// By each other's memory alone.
    pub fn peers(peers: PeerConfig) -> Self {
        let crossover_bytes = Self::CROSSOVER_BYTES;
        Self { peers, nccl: None, crossover_bytes, sum_bytes_max: 0 }
    }
}

/// The data plane of ranks with CUDA devices; with one rank it has no way, and needs none.
pub struct Cards<D: Driver, H> {
    peers: Option<Peers<D>>,
    nccl: Option<Communicator<D>>,
    crossover_bytes: usize,
    warning: Option<String>,
    /// Kept: others learn from its end that this rank is gone.
    host: H,
}

impl<D: Driver, H: HostCollective> Cards<D, H> {
    /// Meets the other ranks. Every rank of the group does so at once.
    ///
    /// # Errors
    /// `Device` where there is no memory, or ranks have no way to exchange: it names what is wrong
    /// with each; the host exchange's.
    pub fn new(device: &Cuda<D>, host: H, config: &CardsConfig) -> Result<Self, CollectiveError> {
        let crossover_bytes = config.crossover_bytes;
        let mut cards = Self { peers: None, nccl: None, crossover_bytes, warning: None, host };
        if cards.host.world_size() == 1 {
            return Ok(cards);
        }
        let peers = cards.map_peers(device, config.peers)?;
        let of_use = peers.is_err() || config.sum_bytes_max > crossover_bytes;
        let nccl = match &config.nccl {
            Some(library) if of_use => {
                Some(cards.meet(device, library, (config, peers.is_err()))?)
            }
            _ => None,
        };
        match (&peers, nccl) {
            (_, Some(Ok(nccl))) => cards.nccl = Some(nccl),
            (Ok(_), Some(Err(why))) => {
                cards.warning = Some(format!(
                    "sums of more than {crossover_bytes} bytes go by the cards' memory, for want \
                     of NCCL: {why}"
                ));
            }
            (Ok(_), None) => {}
            (Err(peers), nccl) => {
                let nccl = match nccl {
                    Some(Err(why)) => why,
                    _ => "it is turned off; leave --nccl out".into(),
                };
                return Err(CollectiveError::Device(format!(
                    "ranks exchange neither by each other's memory: {peers}; nor by NCCL: {nccl}"
                )));
            }
        }
        cards.peers = peers.ok();
        Ok(cards)
    }

    /// What is slower than it could be, the same on every rank.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// Makes this rank's region and maps the others'; or why a rank could not, first of all ranks.
    fn map_peers(
        &mut self,
        device: &Cuda<D>,
        config: PeerConfig,
    ) -> Result<Result<Peers<D>, String>, CollectiveError> {
        let region = PeerRegion::new(device.driver(), config)?;
        let tickets = self.host.all_gather_bytes(&region.ticket(device.driver())?)?;
        let rank = self.host.rank();
        let others = Peers::map_others(device.driver(), rank, &tickets);
        // Every rank's region stays until all have tried.
        let others = self.agreed(others.map_err(told))?;
        Ok(others.map(|others| Peers::new(region, rank, others)))
    }

    /// Opens NCCL and meets the other ranks by it; or why a rank could not, first of all ranks.
    /// `alone`: there is no other way.
    fn meet(
        &mut self,
        device: &Cuda<D>,
        library: &OsString,
        (config, alone): (&CardsConfig, bool),
    ) -> Result<Result<Communicator<D>, String>, CollectiveError> {
        let (rank, ranks) = (self.host.rank(), self.host.world_size());
        let opened = Nccl::open(library).and_then(|library| {
            let id = if rank == 0 { library.unique_id()?.0.to_vec() } else { Vec::new() };
            Ok((library, id))
        });
        let (library, id) = match self.agreed(opened.map_err(told))? {
            Ok(opened) => opened,
            Err(why) => return Ok(Err(why)),
        };
        let offer = [&library.version().to_le_bytes()[..], &id].concat();
        let offers = self.host.all_gather_bytes(&offer)?;
        let release =
            |rank: usize| offers[rank].first_chunk().map_or(0, |of| i32::from_le_bytes(*of));
        if let Some(other) = (0..ranks).find(|other| release(*other) != release(0)) {
            let (first, second) = (release(0), release(other));
            // They would not understand each other.
            return Ok(Err(format!(
                "rank 0 has release {first} and rank {other} {second}; install the same for all"
            )));
        }
        let id = offers[0].get(4..).and_then(|id| id.try_into().ok());
        let id = id.ok_or_else(|| CollectiveError::Mismatch("rank 0 made no id".into()))?;
        let PeerConfig { limit, first_limit, .. } = config.peers;
        let limits = NcclLimits { first: first_limit.min(MEET_LIMIT), usual: limit };
        let place = NcclPlace { rank, ranks, id: UniqueId(id) };
        let met = Communicator::meet(device.driver(), library, place, limits);
        let mut nccl = match self.agreed(met.map_err(told))? {
            Ok(nccl) => nccl,
            Err(why) => return Ok(Err(why)),
        };
        let launched = warm_up(device, &mut nccl, (config, alone));
        // No device waits for a rank that still loads code.
        if let Err(why) = self.agreed(launched.map_err(told))? {
            return Ok(Err(why));
        }
        nccl.check(device.driver())?;
        Ok(Ok(nccl))
    }

    /// What this rank has got, where every rank has; else why the first of them has not.
    fn agreed<T>(&mut self, mine: Result<T, String>) -> Result<Result<T, String>, CollectiveError> {
        let failure = mine.as_ref().err().map_or("", String::as_str);
        let failures = self.host.all_gather_bytes(failure.as_bytes())?;
        let failed = failures.iter().position(|failure| !failure.is_empty());
        Ok(match failed {
            None => mine,
            Some(rank) => Err(format!("rank {rank}: {}", String::from_utf8_lossy(&failures[rank]))),
        })
    }

    /// NCCL, where it is the way for a sum of x.
    fn nccl_for(&mut self, x: &Tensor<Cuda<D>>) -> Option<&mut Communicator<D>> {
        let bytes = x.rows.saturating_mul(x.cols).saturating_mul(Element::Bf16.bytes());
        let of_use = self.peers.is_none() || bytes > self.crossover_bytes;
        self.nccl.as_mut().filter(|_| of_use)
    }

    fn gather(
        &mut self,
        device: &Cuda<D>,
        (out, x): (&mut Tensor<Cuda<D>>, &Tensor<Cuda<D>>),
        cols: &[usize],
        to_all: bool,
    ) -> Result<(), CollectiveError> {
        match (&self.peers, &mut self.nccl) {
            (Some(peers), _) => Ok(device.peer_gather(peers, out, x, cols, to_all)?),
            (None, Some(nccl)) => Ok(device.nccl_gather(nccl, out, x, cols, to_all)?),
            (None, None) => Err(CollectiveError::Mismatch("one rank has nothing to gather".into())),
        }
    }
}

/// For a sentence that names the rank and the way.
fn told(error: KernelError) -> String {
    match error {
        KernelError::Device(text) => text,
        other => other.to_string(),
    }
}

/// Exchanges in every order of size that is to come: NCCL makes connections and loads code in the
/// first call of a kind, for which a step has no time.
fn warm_up<D: Driver>(
    device: &Cuda<D>,
    nccl: &mut Communicator<D>,
    (config, alone): (&CardsConfig, bool),
) -> Result<(), KernelError> {
    // Of a row as kernels take it.
    let elements = |bytes: usize| (bytes / Element::Bf16.bytes()).next_multiple_of(8).max(8);
    let least = elements(if alone { 0 } else { config.crossover_bytes });
    let most = elements(config.sum_bytes_max);
    let mut x = Tensor::zeros(device, 1, most)?;
    let sizes = iter::successors(Some(least), |size| Some(8 * size));
    for size in sizes.take_while(|size| *size < most).chain([most]) {
        x.cols = size;
        device.nccl_sum(nccl, &mut x)?;
    }
    if alone {
        let (cols, part) = (vec![8; nccl.ranks()], Tensor::exact_zeros(device, 1, 8)?);
        let mut all = Tensor::exact_zeros(device, 1, 8 * cols.len())?;
        device.nccl_gather(nccl, &mut all, &part, &cols, true)?;
    }
    Ok(())
}

impl<D: Driver, H: HostCollective> Collective<Cuda<D>> for Cards<D, H> {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn world_size(&self) -> usize {
        self.host.world_size()
    }

    fn all_reduce_sum(
        &mut self,
        device: &Cuda<D>,
        x: &mut Tensor<Cuda<D>>,
    ) -> Result<(), CollectiveError> {
        if let Some(nccl) = self.nccl_for(x) {
            return Ok(device.nccl_sum(nccl, x)?);
        }
        let Some(peers) = &self.peers else { return Ok(()) };
        Ok(device.peer_sum(peers, x, None)?)
    }

    fn all_reduce_add_norm(
        &mut self,
        device: &Cuda<D>,
        delta: &mut Tensor<Cuda<D>>,
        then: AddNorm<'_, Cuda<D>>,
    ) -> Result<(), CollectiveError> {
        if self.nccl_for(delta).is_none()
            && let Some(peers) = &self.peers
        {
            return Ok(device.peer_sum(peers, delta, Some(then))?);
        }
        self.all_reduce_sum(device, delta)?;
        let AddNorm { x, out, weight, eps } = then;
        Ok(device.add_rms_norm(out, x, delta, weight, eps)?)
    }

    fn all_gather_cols(
        &mut self,
        device: &Cuda<D>,
        out: &mut Tensor<Cuda<D>>,
        x: &Tensor<Cuda<D>>,
        cols: &[usize],
    ) -> Result<(), CollectiveError> {
        self.gather(device, (out, x), cols, true)
    }

    fn gather_cols(
        &mut self,
        device: &Cuda<D>,
        out: &mut Tensor<Cuda<D>>,
        x: &Tensor<Cuda<D>>,
        cols: &[usize],
    ) -> Result<(), CollectiveError> {
        self.gather(device, (out, x), cols, false)
    }

    fn share(&mut self, device: &Cuda<D>, x: &mut Tensor<Cuda<D>>) -> Result<(), CollectiveError> {
        match (&self.peers, &mut self.nccl) {
            (Some(peers), _) => Ok(device.peer_share(peers, x)?),
            (None, Some(nccl)) => Ok(device.nccl_share(nccl, x)?),
            (None, None) => Ok(()),
        }
    }

    fn is_captured(&self, elements: usize) -> bool {
        // NCCL's calls are asked after, one by one.
        let bytes = elements.saturating_mul(Element::Bf16.bytes());
        self.nccl.is_none() || (self.peers.is_some() && bytes <= self.crossover_bytes)
    }

    fn end_step(&mut self, device: &Cuda<D>) -> Result<(), CollectiveError> {
        if let Some(nccl) = &mut self.nccl {
            nccl.end_step(device.driver())?;
        }
        let Some(peers) = &mut self.peers else { return Ok(()) };
        Ok(peers.end_step(device.driver())?)
    }

    fn check(&mut self, device: &Cuda<D>) -> Result<(), CollectiveError> {
        // First: what it knows explains why a device does not finish.
        if let Some(nccl) = &mut self.nccl {
            nccl.check(device.driver())?;
        }
        let Some(peers) = &mut self.peers else { return Ok(()) };
        Ok(peers.check(device.driver())?)
    }
}
