//! Ranks on cards of one machine exchange by each other's memory, without the host.
//!
//! The host's exchange is needed once, to tell every rank how to map the others' regions.

use super::{Collective, CollectiveError, HostCollective};
use cuda::{Cuda, Driver, PeerConfig, PeerRegion, Peers};
use kernels::{AddNorm, Tensor};

/// The data plane of ranks with CUDA devices that reach each other.
pub struct PeerMemory<D: Driver, H> {
    /// `None` where there is one rank.
    peers: Option<Peers<D>>,
    /// Kept: others learn from its end that this rank is gone.
    host: H,
}

impl<D: Driver, H: HostCollective> PeerMemory<D, H> {
    /// Makes this rank's region and maps the others'. Every rank of the group does so at once.
    ///
    /// # Errors
    /// `Device` where there is no memory, or a device cannot reach another's; the host exchange's.
    pub fn new(device: &Cuda<D>, mut host: H, config: PeerConfig) -> Result<Self, CollectiveError> {
        if host.world_size() == 1 {
            return Ok(Self { peers: None, host });
        }
        let region = PeerRegion::new(device.driver(), config)?;
        let tickets = host.all_gather_bytes(&region.ticket(device.driver())?)?;
        let others = Peers::map_others(device.driver(), host.rank(), &tickets);
        // Every rank's region stays until all have tried, and all hear why one could not.
        let failure = others.as_ref().err().map(ToString::to_string).unwrap_or_default();
        let failures = host.all_gather_bytes(failure.as_bytes())?;
        let failed = failures.iter().position(|failure| !failure.is_empty());
        if let Some(rank) = failed {
            let why = String::from_utf8_lossy(&failures[rank]);
            return Err(CollectiveError::Device(format!("rank {rank}: {why}")));
        }
        let peers = Peers::new(region, host.rank(), others?);
        Ok(Self { peers: Some(peers), host })
    }

    fn gather(
        &self,
        device: &Cuda<D>,
        (out, x): (&mut Tensor<Cuda<D>>, &Tensor<Cuda<D>>),
        cols: &[usize],
        to_all: bool,
    ) -> Result<(), CollectiveError> {
        let Some(peers) = &self.peers else {
            return Err(CollectiveError::Mismatch("one rank has nothing to gather".into()));
        };
        Ok(device.peer_gather(peers, out, x, cols, to_all)?)
    }
}

impl<D: Driver, H: HostCollective> Collective<Cuda<D>> for PeerMemory<D, H> {
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
        let Some(peers) = &self.peers else { return Ok(()) };
        Ok(device.peer_sum(peers, x, None)?)
    }

    fn all_reduce_add_norm(
        &mut self,
        device: &Cuda<D>,
        delta: &mut Tensor<Cuda<D>>,
        then: AddNorm<'_, Cuda<D>>,
    ) -> Result<(), CollectiveError> {
        let Some(peers) = &self.peers else {
            let AddNorm { x, out, weight, eps } = then;
            return Ok(kernels::Backend::add_rms_norm(device, out, x, delta, weight, eps)?);
        };
        Ok(device.peer_sum(peers, delta, Some(then))?)
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

    fn is_captured(&self) -> bool {
        true
    }

    fn share(&mut self, device: &Cuda<D>, x: &mut Tensor<Cuda<D>>) -> Result<(), CollectiveError> {
        let Some(peers) = &self.peers else { return Ok(()) };
        Ok(device.peer_share(peers, x)?)
    }

    fn end_step(&mut self, device: &Cuda<D>) -> Result<(), CollectiveError> {
        let Some(peers) = &mut self.peers else { return Ok(()) };
        Ok(peers.end_step(device.driver())?)
    }

    fn check(&mut self, device: &Cuda<D>) -> Result<(), CollectiveError> {
        let Some(peers) = &mut self.peers else { return Ok(()) };
        Ok(peers.check(device.driver())?)
    }
}
