//! A rank other than 0 that is a process of its own, from one epoch of its group to the next.
//!
//! A group that fails is formed anew: ranks that live keep what they have loaded, and wait for the
//! place of the next epoch. A link carries signs of life, whatever the rank does: a leader that
//! falls silent there is left.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use collective::{Beats, CollectiveError, Cut, GroupId, HostCollective, Loss, Tcp};
use kernels::Backend;
use model::{Checkpoint, ModelError, ModelShard};

use super::{
    devices::{Devices, Task, on_devices},
    follower::{LOAD_DEADLINE, RankOptions, agree, all_loaded, follow, load, open_same},
    place::{Place, Places},
    process::{NODES_DEADLINE, RANK_PROTOCOL, STOPPED},
};
use crate::WorkerError;

/// A leader may be stopped for longer than a rank: its ranks do nothing without it.
const LEADER_SILENCE: Duration = Duration::from_secs(10);
/// How long a rank keeps what it has loaded for a leader that does not come.
const KEEP_LIMIT: Duration = NODES_DEADLINE;
/// How long one attempt to reach the leader lasts: meanwhile another may lead.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Between two attempts.
const RETRY: Duration = Duration::from_millis(200);

/// Which rank a process is.
#[derive(Clone, Debug)]
pub struct RankConfig {
    /// At least 1: rank 0 is the leader.
    pub rank: usize,
    pub world_size: usize,
    /// The checkpoint on this machine; `None`: where the leader has it.
    pub model: Option<PathBuf>,
    /// With it the links to the leader are TLS.
    pub tls: Option<tls::Cluster>,
}

/// Serves as one rank until a leader says stop; blocks the calling thread. Where the group meets,
/// standard input says, and what to load, the leader. Ends the process when standard input closes:
/// then the parent is gone.
///
/// Errors: no leader has let this rank in for 10 minutes; the model cannot be loaded; the device
/// fails.
pub fn run_rank(config: RankConfig) -> Result<(), WorkerError> {
    let places = Places::of_parent()
        .map_err(WorkerError::io("starting the thread that listens to the parent"))?;
    let joined = join(&places, &config)?;
    let (device, cpu) = (joined.options.device.clone(), joined.options.cpu);
    on_devices(&device, config.world_size, cpu, Rank { config, places, joined })
}

/// A rank that has joined, and has nothing loaded yet.
struct Rank {
    config: RankConfig,
    places: Places,
    joined: Joined,
}

impl Task for Rank {
    type Out = ();

    fn on<D: Devices>(self, devices: D) -> Result<(), WorkerError> {
        let Self { config, places, mut joined } = self;
        let (device, cpu) = (joined.options.device.clone(), joined.options.cpu);
        let mut held = Held { model: None, loaded: None };
        loop {
            match joined.serve(&devices, &config, &mut held) {
                Ok(()) => return Ok(()),
                Err(error) if held.loaded.is_some() || is_lost(&error) => {
                    let keeps = held.loaded.is_some();
                    tracing::warn!(%error, keeps, "the group has failed; waiting for the next");
                }
                Err(error) => return Err(error),
            }
            joined = join(&places, &config)?;
            if (&joined.options.device, joined.options.cpu) != (&device, cpu) {
                // A new process opens them.
                return Err(WorkerError::Config("the leader wants other devices".into()));
            }
        }
    }
}

/// Whether it is others that failed.
fn is_lost(error: &WorkerError) -> bool {
    match error {
        WorkerError::Model(ModelError::Collective(error)) => {
            !matches!(error, CollectiveError::Device(_))
        }
        WorkerError::Group(_) => true,
        _ => false,
    }
}

/// Waits for the next place and enters the epoch there, or at a newer one.
fn join(places: &Places, config: &RankConfig) -> Result<Joined, WorkerError> {
    let mut began = Instant::now();
    let mut place = None;
    loop {
        if let Some(newer) = places.next(if place.is_none() { KEEP_LIMIT } else { RETRY }) {
            (place, began) = (Some((newer, false)), Instant::now());
        }
        let Some((at, told)) = &mut place else {
            return Err(WorkerError::Group(told_late()));
        };
        match Joined::at(at, config, places) {
            Err(error) if is_lost(&error) && began.elapsed() < KEEP_LIMIT => {
                if !std::mem::replace(told, true) {
                    tracing::warn!(epoch = at.epoch, %error, "not in the group; trying again");
                }
            }
            joined => return joined,
        }
    }
}

fn told_late() -> String {
    format!("no leader has come within {} s", KEEP_LIMIT.as_secs())
}

/// What a rank keeps from one epoch to the next.
struct Held<B: Backend> {
    /// And what it is, as its leader said.
    model: Option<(Checkpoint, BTreeMap<String, String>)>,
    loaded: Option<ModelShard<B>>,
}

/// A rank in an epoch.
struct Joined {
    control: Tcp,
    data: Tcp,
    /// Signs of life; its end tells the leader that this rank is gone.
    beats: Beats,
    options: RankOptions,
    facts: BTreeMap<String, String>,
}

impl Joined {
    fn at(place: &Place, config: &RankConfig, places: &Places) -> Result<Self, WorkerError> {
        let Place { epoch, leader, token } = place;
        let leader = leader.to_string();
        let id = GroupId { world_size: config.world_size, epoch: *epoch, token: token.clone() };
        let tls = config.tls.as_ref().map(|tls| tls.client(RANK_PROTOCOL));
        let connect = |link| -> Result<Tcp, WorkerError> {
            let place = (config.rank, link);
            let joined = Tcp::connect(&leader, place, &id, tls.as_ref(), CONNECT_LIMIT);
            let joined = joined.map_err(ModelError::from)?;
            let links = Cut::of(&[&joined]).map_err(WorkerError::io("links of the group"))?;
            places.end_links(links);
            Ok(joined)
        };
        let (mut control, mut data, beats) = (connect(0)?, connect(1)?, connect(2)?);
        control.set_data_deadline(LOAD_DEADLINE);
        let mut message = Vec::new();
        control.broadcast(&mut message, NODES_DEADLINE).map_err(ModelError::from)?;
        // The leader listens since all ranks are there.
        let links = Cut::of(&[&control, &data]).map_err(WorkerError::io("links of the group"))?;
        let left = move |_, loss| {
            if let Loss::Silent(limit) = loss {
                let seconds = limit.as_secs();
                tracing::error!("the leader has not been heard of for {seconds} s: {STOPPED}");
            }
            links.cut();
        };
        let beats = Beats::start(beats, LEADER_SILENCE, left)
            .map_err(WorkerError::io("starting the thread that hears the leader"))?;
        let (options, facts): (RankOptions, _) = postcard::from_bytes(&message)
            .map_err(|error| WorkerError::Config(format!("the leader's options: {error}")))?;
        if let Some(deadline) = options.data_deadline() {
            data.set_data_deadline(deadline);
        }
        Ok(Self { control, data, beats, options, facts })
    }

    /// Until the leader says stop, or the group fails; then `held` has what was loaded.
    fn serve<D: Devices>(
        mut self,
        devices: &D,
        config: &RankConfig,
        held: &mut Held<D::Backend>,
    ) -> Result<(), WorkerError> {
        let options = &self.options;
        let model = match held.model.take() {
            Some((checkpoint, facts)) if facts == self.facts => Ok(checkpoint),
            _ => {
                held.loaded = None;
                let path = config.model.as_ref().unwrap_or(&options.model);
                open_same(path, options.random, &self.facts)
            }
        };
        agree(&mut self.control, &model)?;
        let (checkpoint, _) = held.model.insert((model?, self.facts));
        let loaded = load(devices, self.data, (checkpoint, options), &mut held.loaded, &mut |_| {});
        let mut runner = all_loaded(&mut self.control, loaded, &mut held.loaded)?;
        let ended = follow(&mut runner, &mut self.control, options.step_limit);
        if ended.is_err() {
            held.loaded = Some(runner.leave()?);
        }
        // Giving back what the runner holds may take longer than the leader waits.
        drop(self.beats);
        ended
    }
}
