//! Ranks as processes of their own: a rank that dies or hangs can be seen, named and ended.
//!
//! Rank 0 is the worker's process. It starts the others from its own executable, tells them by
//! their standard input where the group meets, hands them everything else over the control link,
//! and watches them: what a rank said last is part of the reason when it ends. A third link carries
//! signs of life, independent of what ranks do: one that is stopped or cut off is noticed by its
//! silence. A group that has lost a rank is formed anew, as the next epoch: the ranks that live
//! keep what they have loaded.

use std::{
    fs::File,
    io::Read,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use cluster::{
    Reign,
    port::{HandshakeFailures, Port},
};
use collective::{Beats, Cut, GroupId, HostCollective, Loss, Tcp, TcpDoor};
use engine::plan::{Executor, ExecutorError, StepOutput, StepPlan};
use model::{Checkpoint, ModelError, ModelShard};
use tokio::runtime::Handle;

use super::{
    GroupConfig, LoadProgress, Nodes,
    devices::Devices,
    failures::{REASON_PATIENCE, RankFailures},
    follower::{LOAD_DEADLINE, RankOptions, agree, all_loaded, load},
    leader::{Leader, Ranks},
    place::Place,
    rank_process::{RankProcesses, Shared, Spawning},
    restarts::Restarts,
    sizing::Sizing,
};
use crate::WorkerError;

/// How long ranks and leader look for each other.
pub(super) const JOIN_DEADLINE: Duration = Duration::from_secs(30);
/// The same for ranks of other machines, which may start much later.
pub(super) const NODES_DEADLINE: Duration = Duration::from_secs(600);
/// Between two lines about who is still missing.
pub(super) const TELL_AGAIN: Duration = Duration::from_secs(10);
/// Between two looks at whether a rank ended instead of coming.
const POLL: Duration = Duration::from_millis(20);
/// A rank that its leader does not hear of for so long is lost. Several times what a thread that
/// sleeps most of the time waits for a processor.
const RANK_SILENCE: Duration = Duration::from_secs(2);

/// The links of each rank: what the leader says, what ranks compute, and signs of life.
pub(super) const LINKS: usize = 3;

/// What ranks speak under TLS.
pub(super) const RANK_PROTOCOL: &str = "lockstep-ranks";

pub(super) const STOPPED: &str = "its process is stopped or its machine is cut off";

/// Starts and watches the other ranks; this process is rank 0. `epoch` is kept at the number of the
/// group's epoch.
pub(super) fn start<D: Devices>(
    sizing: &Sizing,
    devices: D,
    epoch: Arc<AtomicU64>,
    progress: LoadProgress<'_>,
) -> Result<Box<dyn Executor>, WorkerError> {
    let Sizing { config, checkpoint, options, .. } = sizing;
    let former = Former {
        config: config.clone(),
        checkpoint: checkpoint.clone(),
        options: options.clone(),
        devices,
        processes: Shared::default(),
        failures: RankFailures::default(),
        epoch,
        runtime: Handle::try_current().ok(),
    };
    let leader = former.form(&mut None, &|| true, progress)?;
    Ok(Box::new(Group { former, leader: Some(leader), restarts: Restarts::default() }))
}

/// A group, whatever becomes of its ranks.
struct Group<D: Devices> {
    former: Former<D>,
    /// `None` where the group has failed for good.
    leader: Option<Leader<D::Backend, D::Link<Tcp>>>,
    restarts: Restarts,
}

impl<D: Devices> Group<D> {
    fn leader(&mut self) -> Result<&mut Leader<D::Backend, D::Link<Tcp>>, ExecutorError> {
        self.leader.as_mut().ok_or_else(|| ExecutorError("the group has ended".into()))
    }
}

impl<D: Devices> Executor for Group<D> {
    fn depth(&self) -> usize {
        self.leader.as_ref().map_or(1, Leader::depth)
    }

    fn launch(&mut self, plan: StepPlan) -> Result<(), ExecutorError> {
        self.leader()?.launch(plan)
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        self.leader()?.finish()
    }

    fn idle(&mut self) -> Result<(), ExecutorError> {
        self.leader()?.idle()
    }

    fn recover(&mut self, wanted: &dyn Fn() -> bool) -> Result<(), ExecutorError> {
        let Some(leader) = self.leader.take() else { return self.leader().map(drop) };
        let (model, mut reason) = leader.leave()?;
        let mut held = Some(model);
        let began = Instant::now();
        loop {
            self.restarts.wait(&reason, wanted)?;
            match self.former.form(&mut held, wanted, &mut |_| {}) {
                Ok(leader) => {
                    let (seconds, epoch) = (began.elapsed().as_secs_f64(), self.former.epoch());
                    tracing::info!(epoch, seconds, "the group is complete again");
                    self.leader = Some(leader);
                    return Ok(());
                }
                Err(error) if held.is_none() => return Err(ExecutorError(error.to_string())),
                Err(error) => reason = error.to_string(),
            }
            tracing::warn!(reason, "the group is not complete again");
        }
    }
}

/// What makes a group, whenever that is.
struct Former<D: Devices> {
    config: GroupConfig,
    checkpoint: Arc<Checkpoint>,
    options: RankOptions,
    devices: D,
    /// From one epoch to the next.
    processes: Shared,
    failures: RankFailures,
    epoch: Arc<AtomicU64>,
    /// For what tells other machines.
    runtime: Option<Handle>,
}

impl<D: Devices> Former<D> {
    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Opens the next epoch, brings all ranks into it, and loads what is not `held`; what is loaded
    /// goes back there where another rank is the reason of a failure.
    fn form(
        &self,
        held: &mut Option<ModelShard<D::Backend>>,
        wanted: &dyn Fn() -> bool,
        progress: LoadProgress<'_>,
    ) -> Result<Leader<D::Backend, D::Link<Tcp>>, WorkerError> {
        let _entered = self.runtime.as_ref().map(Handle::enter);
        let Self { config, options, failures, .. } = self;
        self.processes.with(|processes| processes.leave(&failures.ended()));
        let Opened { door, place, reign } = open_door(config, self.epoch() + 1)?;
        self.epoch.store(place.epoch, Ordering::Relaxed);
        failures.clear();
        let spawning = Spawning {
            world_size: config.ranks,
            model: None,
            program: config.rank_program.clone(),
            tls: config.nodes.as_ref().and_then(|nodes| nodes.tls.clone()),
            failures: failures.clone(),
        };
        self.processes.with(|processes| {
            (1..config.ranks_here()).try_for_each(|rank| processes.bring(rank, &place, &spawning))
        })?;
        let joined = || -> Result<_, WorkerError> {
            let (nodes, processes) = (config.nodes.as_ref(), &self.processes);
            let entering = Entering { failures, nodes, processes, wanted };
            let (door, [mut control, mut data, beats]) = entering.admit(door)?;
            let links = Cut::of(&[&control, &data]);
            failures.end_links(links.map_err(WorkerError::io("links of the group"))?);
            control.set_data_deadline(LOAD_DEADLINE);
            let mut message = postcard::to_stdvec(&(options, self.checkpoint.facts()?))
                .map_err(|error| WorkerError::Config(format!("options for the ranks: {error}")))?;
            // Ranks give signs of life from this message on.
            self.processes.with(|processes| -> Result<(), WorkerError> {
                processes.keep(listen(beats, failures, processes.killer())?, reign, door);
                Ok(())
            })?;
            control.broadcast(&mut message, JOIN_DEADLINE).map_err(ModelError::from)?;
            agree(&mut control, &Ok(()))?;
            if let Some(deadline) = options.data_deadline() {
                data.set_data_deadline(deadline);
            }
            let model = (&*self.checkpoint, options);
            let loaded = load(&self.devices, data, model, held, progress);
            Ok((all_loaded(&mut control, loaded, held)?, control))
        };
        let (runner, control) = joined().map_err(|error| failures.or_cause(error))?;
        let ways = (self.devices.compute_beside_the_host(), options.step_limit);
        let (failures, followers) = (failures.clone(), self.processes.clone());
        Leader::new(runner, control, Ranks { failures, followers }, ways)
    }
}

/// Where ranks are waited for.
struct Opened {
    door: TcpDoor,
    place: Place,
    /// Where ranks of other machines learn of it.
    reign: Option<Reign>,
}

/// On loopback, where all ranks are on this machine; of `epoch`, unless others count it too.
fn open_door(config: &GroupConfig, epoch: u64) -> Result<Opened, WorkerError> {
    let (world_size, token) = (config.ranks, secret()?);
    let addr = match &config.nodes {
        None => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        Some(nodes) => nodes.door()?,
    };
    let failed = |source| WorkerError::Bind { addr, source };
    let id = GroupId { world_size, epoch, token: token.clone() };
    let tls = config.nodes.as_ref().and_then(|nodes| nodes.tls.as_ref());
    let served = tls.map(|tls| tls.server(&[RANK_PROTOCOL]));
    let mut door = Tcp::listen(addr, id, LINKS, served).map_err(failed)?;
    let leader = door.local_addr().map_err(failed)?;
    let reign = match &config.nodes {
        None => None,
        Some(nodes) => Some(nodes.lead((leader, token.clone()), |epoch| door.set_epoch(epoch))?),
    };
    let epoch = reign.as_ref().map_or(epoch, |reign| reign.epoch);
    Ok(Opened { door, place: Place { epoch, leader, token }, reign })
}

/// Ranks on their way into an epoch.
struct Entering<'a> {
    failures: &'a RankFailures,
    nodes: Option<&'a Nodes>,
    processes: &'a Shared,
    /// Whether the group is.
    wanted: &'a dyn Fn() -> bool,
}

impl Entering<'_> {
    /// Waits for all ranks, or for the first that ends instead of coming; the door and their links.
    fn admit(&self, mut door: TcpDoor) -> Result<(TcpDoor, [Tcp; LINKS]), WorkerError> {
        let Self { failures, nodes, processes, wanted } = self;
        let (start, mut told) = (Instant::now(), Instant::now());
        let limit = if nodes.is_some() { NODES_DEADLINE } else { JOIN_DEADLINE };
        // It tells of those who are turned away.
        let port = Port::new("ranks", None, HandshakeFailures::default());
        while !door.admit(POLL).map_err(ModelError::from)? {
            if let Some((peer, fault)) = door.refused() {
                port.refuse(peer, &fault);
            }
            processes.with(RankProcesses::end_deaf);
            if let Some(reason) = failures.describe(Duration::ZERO) {
                return Err(WorkerError::Group(reason));
            }
            if !wanted() {
                return Err(WorkerError::Group("it is to end".into()));
            }
            let (missing, waited) = (door.missing(), start.elapsed());
            let who =
                || nodes.map_or_else(|| format!("ranks {missing:?}"), |of| of.named(&missing));
            if waited >= limit {
                let (who, seconds) = (who(), limit.as_secs());
                let reason = format!("no sign of {who} within {seconds} s; start what is missing");
                missing.iter().for_each(|&rank| failures.report(rank, &*reason));
                return Err(WorkerError::Group(reason));
            }
            if told.elapsed() >= TELL_AGAIN {
                told = Instant::now();
                tracing::info!(seconds = waited.as_secs(), "waiting for {}", who());
            }
        }
        let links = door.links().map_err(ModelError::from)?;
        let wrong =
            |links: Vec<Tcp>| WorkerError::Group(format!("{} links of a rank", links.len()));
        Ok((door, links.try_into().map_err(wrong)?))
    }
}

/// Hears the other ranks; one that falls silent is ended and reported.
fn listen(
    beats: Tcp,
    failures: &RankFailures,
    kill: impl Fn(usize) + Send + Sync + 'static,
) -> Result<Beats, WorkerError> {
    let failures = failures.clone();
    let lost = move |rank: usize, loss: Loss| match loss {
        Loss::Silent(limit) => {
            let seconds = limit.as_secs();
            failures.report(rank, format!("it has not been heard of for {seconds} s: {STOPPED}"));
            kill(rank);
        }
        // Whoever sees how its process ends knows more.
        Loss::Closed => {
            if failures.describe(REASON_PATIENCE).is_none() {
                failures.report_left(rank);
            }
        }
    };
    Beats::start(beats, RANK_SILENCE, lost)
        .map_err(WorkerError::io("starting the threads that hear the ranks"))
}

/// 128 random bits in hexadecimal.
fn secret() -> Result<String, WorkerError> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(WorkerError::io("drawing the ranks' secret from /dev/urandom"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
