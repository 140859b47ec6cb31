//! Ranks as processes of their own: a rank that dies or hangs can be seen, named and ended.
//!
//! Rank 0 is the worker's process. It starts the others from its own executable, hands them a
//! secret through the environment and everything else over the control link, and watches them: what
//! a rank said last is part of the reason when it ends. A rank's standard input is held open by its
//! parent; when that closes, the parent is gone, and the rank ends too. A third link carries signs
//! of life, independent of what ranks do: one that is stopped or cut off is noticed by its silence.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use cluster::{
    Reign,
    port::{HandshakeFailures, Port},
    telemetry,
};
use collective::{Beats, Cut, GroupId, HostCollective, Loss, Tcp, TcpDoor};
use engine::plan::Executor;
use model::{Checkpoint, ModelError};

use super::{
    GroupConfig, LoadProgress, Nodes,
    devices::{Devices, Task, on_devices},
    failures::{REASON_PATIENCE, RankFailures},
    follower::{LOAD_DEADLINE, RankOptions, agree, follow, load, open_same},
    leader::{Ranks, lead},
    rank_process::RankProcesses,
    sizing::Sizing,
};
use crate::WorkerError;

/// The environment variable that brings a rank its group's secret.
pub const RANK_TOKEN_VARIABLE: &str = "LOCKSTEP_RANK_TOKEN";

/// How long ranks and leader look for each other.
const JOIN_DEADLINE: Duration = Duration::from_secs(30);
/// The same for ranks of other machines, which may start much later.
const NODES_DEADLINE: Duration = Duration::from_secs(600);
/// Between two lines about who is still missing.
pub(super) const TELL_AGAIN: Duration = Duration::from_secs(10);
/// Between two looks at whether a rank ended instead of coming.
const POLL: Duration = Duration::from_millis(20);
/// A rank that its leader does not hear of for so long is lost. Several times what a thread that
/// sleeps most of the time waits for a processor.
const RANK_SILENCE: Duration = Duration::from_secs(2);
/// A leader may be stopped for longer: its ranks do nothing without it.
const LEADER_SILENCE: Duration = Duration::from_secs(10);
/// How long a rank may take to end by itself once its leader has closed the links.
const END_LIMIT: Duration = Duration::from_secs(3);

/// The links of each rank: what the leader says, what ranks compute, and signs of life.
const LINKS: usize = 3;

/// What ranks speak under TLS.
const RANK_PROTOCOL: &str = "lockstep-ranks";

/// The place of one rank that is a process.
#[derive(Clone, Debug)]
pub struct RankConfig {
    /// At least 1: rank 0 is the leader.
    pub rank: usize,
    pub world_size: usize,
    /// Where rank 0 listens.
    pub leader: SocketAddr,
    /// Of the group: another is refused.
    pub epoch: u64,
    /// The group's secret.
    pub token: String,
    /// The checkpoint on this machine; `None`: where the leader has it.
    pub model: Option<PathBuf>,
    /// With it the links to the leader are TLS.
    pub tls: Option<tls::Cluster>,
}

impl RankConfig {
    fn id(&self) -> GroupId {
        GroupId { world_size: self.world_size, epoch: self.epoch, token: self.token.clone() }
    }
}

/// Serves as one rank until the leader says stop; blocks the calling thread. What to load, the
/// leader says. Ends the process when standard input closes: then the parent is gone; and when the
/// leader is not heard of for 10 s, whatever the rank is doing.
///
/// Errors: the leader cannot be reached or is lost, or the model cannot be loaded.
pub fn run_rank(config: RankConfig) -> Result<(), WorkerError> {
    thread::Builder::new()
        .name("parent".into())
        .spawn(end_with_parent)
        .map_err(WorkerError::io("starting the thread that watches the parent"))?;
    let (leader, id) = (config.leader.to_string(), config.id());
    let tls = config.tls.as_ref().map(|tls| tls.client(RANK_PROTOCOL));
    let connect = |link| -> Result<Tcp, ModelError> {
        Ok(Tcp::connect(&leader, (config.rank, link), &id, tls.as_ref(), JOIN_DEADLINE)?)
    };
    let (mut control, mut data, beats) = (connect(0)?, connect(1)?, connect(2)?);
    control.set_data_deadline(LOAD_DEADLINE);
    let mut message = Vec::new();
    control.broadcast(&mut message, NODES_DEADLINE).map_err(ModelError::from)?;
    // The leader listens since all ranks are there.
    let beats = Beats::start(beats, LEADER_SILENCE, |_, loss| end_with_leader(loss))
        .map_err(WorkerError::io("starting the thread that hears the leader"))?;
    let (options, facts): (RankOptions, BTreeMap<String, String>) = postcard::from_bytes(&message)
        .map_err(|error| WorkerError::Config(format!("the leader's options: {error}")))?;
    if let Some(deadline) = options.data_deadline() {
        data.set_data_deadline(deadline);
    }
    let path = config.model.as_ref().unwrap_or(&options.model);
    let checkpoint = agree(&mut control, open_same(path, options.random, &facts))?;
    let (device, cpu) = (options.device.clone(), options.cpu);
    let follower = Follower { control, data, beats, checkpoint, options };
    on_devices(&device, config.world_size, cpu, follower)
}

/// A rank that has joined, and has nothing loaded yet.
struct Follower {
    control: Tcp,
    data: Tcp,
    beats: Beats,
    checkpoint: Checkpoint,
    options: RankOptions,
}

impl Task for Follower {
    type Out = ();

    fn on<D: Devices>(mut self, devices: D) -> Result<(), WorkerError> {
        let progress: LoadProgress<'_> = &mut |_| {};
        let loaded = load(&devices, self.data, &self.checkpoint, &self.options, progress);
        let mut runner = agree(&mut self.control, loaded)?;
        let ended = follow(&mut runner, &mut self.control, self.options.step_limit);
        // Giving back what the runner holds may take longer than the leader waits.
        drop(self.beats);
        ended
    }
}

/// Exits the process once the parent closes its standard input.
fn end_with_parent() {
    // An error says the same as the end: nobody holds the other side.
    let _closed = io::copy(&mut io::stdin(), &mut io::sink());
    telemetry::exit(1);
}

/// Exits the process, which may be in a step that nobody wants any more.
fn end_with_leader(loss: Loss) {
    match loss {
        Loss::Silent(limit) => {
            let seconds = limit.as_secs();
            tracing::error!("the leader has not been heard of for {seconds} s: {STOPPED}");
        }
        Loss::Closed => {
            thread::sleep(END_LIMIT);
            tracing::error!("the leader has closed the links of the group");
        }
    }
    telemetry::exit(1);
}

const STOPPED: &str = "its process is stopped or its machine is cut off";

/// Starts and watches the other ranks; this process is rank 0.
pub(super) fn start<D: Devices>(
    sizing: &Sizing,
    devices: D,
    progress: LoadProgress<'_>,
) -> Result<Box<dyn Executor>, WorkerError> {
    let (config, options) = (&sizing.config, &sizing.options);
    let Opened { door, place, reign } = open_door(config)?;
    let failures = RankFailures::default();
    let mut followers = RankProcesses::default();
    for rank in 1..config.ranks_here() {
        let place = RankConfig { rank, ..place.clone() };
        followers.spawn(&place, config.rank_program.clone(), &failures)?;
    }
    let joined = || -> Result<_, WorkerError> {
        let (door, [mut control, mut data, beats]) = admit(door, &failures, config.nodes.as_ref())?;
        let links = Cut::of(&[&control, &data]).map_err(WorkerError::io("links of the group"))?;
        failures.end_links(links);
        control.set_data_deadline(LOAD_DEADLINE);
        let mut message = postcard::to_stdvec(&(options, sizing.checkpoint.facts()?))
            .map_err(|error| WorkerError::Config(format!("options for the ranks: {error}")))?;
        // Ranks give signs of life from this message on.
        followers.keep(listen(beats, &failures, followers.killer())?, reign, door);
        control.broadcast(&mut message, JOIN_DEADLINE).map_err(ModelError::from)?;
        agree(&mut control, Ok(()))?;
        if let Some(deadline) = options.data_deadline() {
            data.set_data_deadline(deadline);
        }
        let loaded = load(&devices, data, &sizing.checkpoint, options, progress);
        Ok((agree(&mut control, loaded)?, control))
    };
    let (runner, control) = joined().map_err(|error| failures.or_cause(error))?;
    let ways = (devices.compute_beside_the_host(), options.step_limit);
    lead(runner, control, Ranks { failures, followers }, ways)
}

/// Where ranks are waited for.
struct Opened {
    door: TcpDoor,
    /// Of any rank of this machine.
    place: RankConfig,
    /// Where ranks of other machines learn of it.
    reign: Option<Reign>,
}

/// On loopback, where all ranks are on this machine.
fn open_door(config: &GroupConfig) -> Result<Opened, WorkerError> {
    let (world_size, token) = (config.ranks, secret()?);
    let addr = match &config.nodes {
        None => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        Some(nodes) => nodes.door()?,
    };
    let failed = |source| WorkerError::Bind { addr, source };
    let id = GroupId { world_size, epoch: 0, token: token.clone() };
    let tls = config.nodes.as_ref().and_then(|nodes| nodes.tls.clone());
    let served = tls.as_ref().map(|tls| tls.server(&[RANK_PROTOCOL]));
    let mut door = Tcp::listen(addr, id, LINKS, served).map_err(failed)?;
    let leader = door.local_addr().map_err(failed)?;
    let reign = match &config.nodes {
        None => None,
        Some(nodes) => Some(nodes.lead((leader, token.clone()), |epoch| door.set_epoch(epoch))?),
    };
    let epoch = reign.as_ref().map_or(0, |reign| reign.epoch);
    let place = RankConfig { rank: 0, world_size, leader, epoch, token, model: None, tls };
    Ok(Opened { door, place, reign })
}

/// Waits for all ranks, or for the first that ends instead of coming; the door and their links.
fn admit(
    mut door: TcpDoor,
    failures: &RankFailures,
    nodes: Option<&Nodes>,
) -> Result<(TcpDoor, [Tcp; LINKS]), WorkerError> {
    let (start, mut told) = (Instant::now(), Instant::now());
    let limit = if nodes.is_some() { NODES_DEADLINE } else { JOIN_DEADLINE };
    // It tells of those who are turned away.
    let port = Port::new("ranks", None, HandshakeFailures::default());
    while !door.admit(POLL).map_err(ModelError::from)? {
        if let Some(reason) = failures.describe(Duration::ZERO) {
            return Err(WorkerError::Group(reason));
        }
        if let Some((peer, fault)) = door.refused() {
            port.refuse(peer, &fault);
        }
        let (missing, waited) = (door.missing(), start.elapsed());
        let who = || nodes.map_or_else(|| format!("ranks {missing:?}"), |of| of.named(&missing));
        if waited >= limit {
            let (who, seconds) = (who(), limit.as_secs());
            let reason = format!("no sign of {who} within {seconds} s; start what is missing");
            return Err(WorkerError::Group(reason));
        }
        if told.elapsed() >= TELL_AGAIN {
            told = Instant::now();
            tracing::info!(seconds = waited.as_secs(), "waiting for {}", who());
        }
    }
    let links = door.links().map_err(ModelError::from)?;
    let wrong = |links: Vec<Tcp>| WorkerError::Group(format!("{} links of a rank", links.len()));
    Ok((door, links.try_into().map_err(wrong)?))
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
                failures.report(rank, "it has left the group");
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
