//! The workers of a schedule, their roster, and what befalls them.

use super::{
    Draw,
    client::End,
    net::Net,
    worker::{Make, Worker},
};
use crate::{
    Deadlines, Limits, RouterError, metrics::Metrics, policy::PrefixAffinity, targets::Targets,
    upstream::Upstream, version::Model,
};
use cluster::{Instance, Roster, State};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

const MODEL: &str = "m";
/// Everything befalls workers within so many milliseconds.
const TROUBLE_MS: u64 = 30_000;
/// Until nothing of a request that has ended is left anywhere.
const SETTLED: Duration = Duration::from_secs(60);

/// In which a router notices that a worker is gone.
const NOTICED: Duration = Duration::from_secs(1);

pub struct World {
    pub upstream: Arc<Upstream>,
    net: Net,
    roster: watch::Sender<Roster>,
    workers: Mutex<Vec<Arc<Worker>>>,
    born: AtomicUsize,
    violations: Arc<Mutex<Vec<String>>>,
    poisoned: AtomicBool,
    /// When workers were lost, by their ids, so that the router must have noticed.
    lost: Mutex<BTreeMap<String, Instant>>,
}

/// What befalls a worker.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Its process ends; the roster hears of it later.
    Killed,
    /// Its group is lost, and tells so.
    Failed,
    /// Nothing reaches it, leaves it, or both.
    Held(bool, bool),
    /// It ends by itself once nothing runs any more.
    Drained,
    Slow,
    /// Its address is somebody else's before the roster knows.
    Replaced,
}

impl Fault {
    fn draw(draw: &mut Draw) -> Self {
        match draw.below(9) {
            0 | 1 => Self::Killed,
            2 => Self::Failed,
            3 => Self::Held(true, true),
            4 => Self::Held(true, false),
            5 => Self::Held(false, true),
            6 => Self::Drained,
            7 => Self::Slow,
            _ => Self::Replaced,
        }
    }
}

/// When things happen to a worker that something befalls.
#[derive(Clone, Copy)]
struct Times {
    lasts: Duration,
    /// Until the roster hears of its end.
    lease: Duration,
    successor: Duration,
    loads: Duration,
}

impl World {
    pub fn new(draw: &mut Draw) -> Arc<Self> {
        let net = Net::default();
        let deadlines = Deadlines::default();
        let (roster, receiver) = watch::channel(Roster::default());
        let queue_max = if draw.one_in(4) { 3 } else { 1024 };
        let upstream = Upstream {
            targets: Targets::follow(receiver, &deadlines, net.dial(deadlines.hello)),
            policy: Box::new(PrefixAffinity::default()),
            limits: Limits { queue_max, ..Limits::default() },
            deadlines,
            metrics: Arc::new(Metrics::new()),
            queued: AtomicUsize::new(0),
        };
        let world = Arc::new(Self {
            upstream: Arc::new(upstream),
            net,
            roster,
            workers: Mutex::default(),
            born: AtomicUsize::new(0),
            violations: Arc::default(),
            poisoned: AtomicBool::new(false),
            lost: Mutex::default(),
        });
        for at in 0..1 + draw.below(4) {
            let make = world.make("f", at, draw);
            world.start(make, Duration::ZERO);
        }
        world
    }

    fn make(&self, fingerprint: &str, at: u64, draw: &mut Draw) -> Make {
        let instance = Instance {
            id: String::new(),
            model: MODEL.into(),
            fingerprint: fingerprint.into(),
            address: format!("http://worker-{at}:7001"),
            protocol: proto::WORKER_PROTOCOL,
            started: 0,
            state: State::Loading,
            context_max: 4096,
            vocab_size: POISON_VOCAB,
            ranks: 1,
            blocks_total: 1000,
            epoch: 0,
            reason: String::new(),
        };
        let running = 1 + draw.below(6) as usize;
        let places = (running, running + draw.below(6) as usize);
        Make { instance, step: Duration::from_millis(1 + draw.below(800)), places }
    }

    /// A new process at the address, which loads for so long.
    fn start(self: &Arc<Self>, mut make: Make, loads: Duration) {
        let born = self.born.fetch_add(1, SeqCst);
        make.instance.started = born as u64;
        make.instance.id = format!("{}-{born:04}", make.instance.address);
        make.instance.state = State::Loading;
        let world = self.clone();
        tokio::spawn(async move {
            world.announce(&make.instance);
            sleep(loads).await;
            let worker = Worker::start(&world.net, make.clone(), &world.violations);
            world.workers.lock().unwrap().push(worker.clone());
            world.announce(&Instance { state: State::Ready, ..make.instance });
            // A group that is lost ends its process, and is started again.
            worker.lost().await;
            sleep(Duration::from_millis(50)).await;
            let soon = Duration::from_millis(200);
            world.end(&worker, soon);
            sleep(soon).await;
            world.start(worker.make.clone(), soon);
        });
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, Arc<Instance>>)) {
        self.roster.send_modify(|roster| {
            let known = roster.iter().map(|instance| (instance.id.clone(), instance.clone()));
            let mut known = known.collect();
            change(&mut known);
            *roster = Arc::new(known.into_values().collect());
        });
    }

    fn announce(&self, instance: &Instance) {
        let instance = Arc::new(instance.clone());
        self.change(|known| {
            known.insert(instance.id.clone(), instance);
        });
    }

    /// The process is gone, the roster hears of it later.
    fn end(self: &Arc<Self>, worker: &Arc<Worker>, lease: Duration) {
        worker.cable.cut();
        self.workers.lock().unwrap().retain(|other| !Arc::ptr_eq(other, worker));
        let (world, id) = (self.clone(), worker.make.instance.id.clone());
        tokio::spawn(async move {
            sleep(lease).await;
            world.change(|known| {
                known.remove(&id);
            });
        });
    }

    /// Lets things befall workers; how many did.
    pub async fn befall(self: &Arc<Self>, draw: &mut Draw) -> usize {
        let count = 1 + draw.below(8);
        let mut moments: Vec<_> = (0..count).map(|_| draw.below(TROUBLE_MS)).collect();
        moments.sort_unstable();
        let mut now = 0;
        for moment in moments {
            sleep(Duration::from_millis(moment - now)).await;
            now = moment;
            if draw.one_in(12) {
                // Somebody begins to roll out other weights.
                let make = self.make("g", 100 + draw.below(100), draw);
                self.start(make, draw.time(2000));
                continue;
            }
            let workers = self.workers.lock().unwrap().clone();
            let Some(victim) = workers.get(draw.below(8) as usize % workers.len().max(1)) else {
                continue;
            };
            let times = Times {
                lasts: draw.time(15_000),
                lease: draw.time(10_000),
                successor: draw.time(15_000),
                loads: draw.time(5000),
            };
            let fault = Fault::draw(draw);
            if matches!(fault, Fault::Killed | Fault::Failed | Fault::Replaced) {
                let id = victim.make.instance.id.clone();
                self.lost.lock().unwrap().entry(id).or_insert_with(Instant::now);
            }
            tracing::info!(at = moment, worker = victim.make.instance.id, ?fault, "befalls");
            tokio::spawn(self.clone().suffer(victim.clone(), fault, times));
        }
        count as usize
    }

    async fn suffer(self: Arc<Self>, worker: Arc<Worker>, fault: Fault, times: Times) {
        match fault {
            Fault::Killed => self.end(&worker, times.lease),
            Fault::Failed => {
                worker.failed.send_replace(true);
                return;
            }
            Fault::Held(to, from) => {
                worker.cable.hold(to, from);
                sleep(times.lasts).await;
                worker.cable.hold(false, false);
                return;
            }
            Fault::Slow => {
                worker.slow.store(true, SeqCst);
                sleep(times.lasts).await;
                worker.slow.store(false, SeqCst);
                return;
            }
            Fault::Drained => {
                let drains = Instance { state: State::Draining, ..worker.make.instance.clone() };
                self.announce(&drains);
                worker.draining.store(true, SeqCst);
                for _ in 0..30 {
                    sleep(Duration::from_secs(1)).await;
                    if worker.live.load(SeqCst) == 0 {
                        break;
                    }
                }
                self.end(&worker, Duration::ZERO);
            }
            Fault::Replaced => {
                self.end(&worker, times.lease);
                self.start(worker.make.clone(), Duration::ZERO);
                return;
            }
        }
        sleep(times.successor).await;
        self.start(worker.make.clone(), times.loads);
    }

    /// The version that a new request is for.
    pub async fn model(&self) -> Arc<Model> {
        let mut changes = self.upstream.targets.changes();
        loop {
            if let Some(version) = self.upstream.targets.now().serving(MODEL) {
                return version.model.clone();
            }
            changes.next().await;
        }
    }

    pub fn poisoned(&self) {
        self.poisoned.store(true, SeqCst);
    }

    pub fn violation(&self, what: String) {
        self.violations.lock().unwrap().push(what);
    }

    /// A request ended so; a violation where what happened is no reason for it.
    pub fn failure(&self, request: &str, begun: bool, error: &RouterError) -> End {
        let error = error.to_string();
        let suspect = error.contains("may be what breaks");
        let breaks = error.split_once("broke ").and_then(|(_, rest)| rest.split(' ').next());
        let breaks: u32 = breaks.and_then(|count| count.parse().ok()).unwrap_or(0);
        let permitted = match begun {
            true => suspect && breaks >= 4,
            // Who breaks two workers, and no others break, cannot be told from who is only there
            // when they do.
            false => error.contains("overloaded") || suspect && (self.is_in_doubt() || breaks >= 3),
        };
        if !permitted {
            self.violation(format!("{request} failed, begun {begun}: {error}"));
        }
        End::Failed(error)
    }

    /// Whether a request breaks workers, or no more than two were lost that the router has noticed.
    fn is_in_doubt(&self) -> bool {
        let lost = self.lost.lock().unwrap();
        let seen = lost.values().filter(|at| at.elapsed() > NOTICED).count();
        self.poisoned.load(SeqCst) || seen <= 2
    }

    /// Sequences that were under way are never refused; others keep to the bound.
    pub fn check_bounds(&self) {
        let queued = self.upstream.queued.load(SeqCst) as u64;
        let bound = self.upstream.limits.queue_max as u64 + self.upstream.metrics.resumes.get();
        if queued > bound {
            self.violation(format!("{queued} wait, at most {bound} may"));
        }
    }

    /// What broke the rules, and what is left once every request has ended.
    pub async fn left_behind(&self) -> Vec<String> {
        sleep(SETTLED).await;
        let mut found = std::mem::take(&mut *self.violations.lock().unwrap());
        let queued = self.upstream.queued.load(SeqCst);
        let counted = self.upstream.metrics.queued.get();
        if (queued, counted) != (0, 0) {
            found.push(format!("{queued} are still in line, {counted} are counted"));
        }
        for model in self.upstream.targets.now().status() {
            for worker in model.workers.iter().filter(|worker| worker.in_flight > 0) {
                found.push(format!("{} in flight to {}", worker.in_flight, worker.id));
            }
            let usable = model.workers.iter().filter(|worker| worker.usable).count();
            if model.fingerprint == "f" && usable == 0 {
                found.push(format!("no worker is usable: {:?}", model.workers));
            }
        }
        for worker in self.workers.lock().unwrap().iter() {
            let live = worker.live.load(SeqCst);
            if live > 0 {
                found.push(format!("{live} still run on {}", worker.make.instance.id));
            }
        }
        found
    }
}

/// So that the token that ends workers exists.
const POISON_VOCAB: usize = super::worker::POISON as usize + 1;
