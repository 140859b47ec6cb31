//! The engine loop: one OS thread that owns the scheduler and the executor.
//!
//! Requests are accepted or refused without the loop, which may be in a long step (`places.rs`).
//! Results go out through mailboxes that never make it wait, and with them how far each sequence
//! has come. As many plans are in flight as the executor wants: with two, commands, plans and
//! results of the others are dealt with while a step runs. A reader that is gone is a cancelled
//! sequence: its blocks are free before the next step. With nothing to do the thread sleeps, and
//! wakes twice a second to tell the other ranks that it lives. The loop leaves a mark at every
//! turn, so that others can tell when it hangs. A group that fails takes its sequences with it;
//! where it can be formed anew, the loop does so and goes on as at the start.

use std::{
    collections::{HashMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use engine::{
    Position, Request, Scheduler, SchedulerConfig, Stats,
    plan::{Executor, ExecutorError, SequenceId},
};
use tokio::sync::watch;

use crate::{
    WorkerError,
    health::{self, Health},
    mailbox::{Delivery, Mailbox, Output},
    metrics::Metrics,
    panic_text,
    places::Places,
    prefixes::Prefixes,
    pulse::Pulse,
};

/// Between two signs of life of an idle leader.
const IDLE_PERIOD: Duration = Duration::from_millis(500);
/// Between two looks at how far every sequence has come: readers are told once a second.
const POSITIONS_PERIOD: Duration = Duration::from_millis(200);

enum Command {
    Submit { request: Box<Request>, delivery: Delivery },
    Stop,
}

/// A running engine. Dropping it stops the loop and fails what still runs.
pub struct Engine {
    /// No longer than `places` allow.
    commands: Sender<Command>,
    places: Arc<Places>,
    prefixes: Arc<Prefixes>,
    pulse: Arc<Pulse>,
    context_max: usize,
    stats: watch::Receiver<Stats>,
    health: Arc<watch::Sender<Health>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Starts the loop on a thread of its own. Fails when the system gives no thread.
    pub fn start(
        executor: Box<dyn Executor>,
        mut config: SchedulerConfig,
        metrics: Arc<Metrics>,
    ) -> Result<Self, WorkerError> {
        let (waiting_max, running_max) = (config.waiting_max.max(1), config.sequences_max.max(1));
        let places = Arc::new(Places::new(waiting_max, running_max));
        // What was accepted is not refused: those on their way to a place count there as waiting.
        config.waiting_max = waiting_max + running_max;
        let scheduler = new_scheduler(&config);
        let prefixes = Arc::new(Prefixes::default());
        let context_max = scheduler.context_max();
        let pulse = Arc::new(Pulse::default());
        let (commands, inbox) = channel();
        let (stats_sender, stats) = watch::channel(scheduler.stats());
        let health = Arc::new(watch::Sender::new(Health::Serves));
        metrics.observe(&Stats::default(), &scheduler.stats());
        let core = Core {
            config,
            last: scheduler.stats(),
            scheduler,
            executor,
            inbox,
            received: 0,
            launched: VecDeque::new(),
            finished: Instant::now(),
            mailboxes: HashMap::new(),
            places: Arc::clone(&places),
            prefixes: Arc::clone(&prefixes),
            pulse: Arc::clone(&pulse),
            positions_told: None,
            stats: stats_sender,
            metrics,
        };
        let thread = thread::Builder::new()
            .name("engine".into())
            .spawn({
                let health = Arc::clone(&health);
                move || core.run_to_end(&health)
            })
            .map_err(WorkerError::io("starting the engine thread"))?;
        let thread = Mutex::new(Some(thread));
        Ok(Self { commands, places, prefixes, pulse, context_max, stats, health, thread })
    }

    /// Accepts a request, or refuses it, at once. The output's first update comes when the first
    /// result does.
    ///
    /// Errors: it can never run or too many wait (`Engine`), or the group does not serve (`Group`).
    pub fn run(&self, request: Request) -> Result<Output, WorkerError> {
        request.check(self.context_max)?;
        if *self.health.borrow() != Health::Serves {
            return Err(self.lost());
        }
        let known = request.prompt.len() + request.generated.len();
        let waiting_ahead = self.places.take()?;
        let position = Position { waiting_ahead, known, ..Position::default() };
        let (delivery, output) = Mailbox::open(position);
        let command = Command::Submit { request: Box::new(request), delivery };
        self.commands.send(command).map_err(|_| self.lost())?;
        Ok(output)
    }

    /// Sequences that may run or wait at once.
    pub fn places(&self) -> usize {
        self.places.max()
    }

    /// What is cached, for those who choose workers by it.
    pub(crate) fn prefixes(&self) -> Arc<Prefixes> {
        Arc::clone(&self.prefixes)
    }

    /// How long ago the loop last turned: an idle one turns twice a second, a busy one once a step.
    /// Nothing while the group is formed anew, which has limits of its own.
    pub fn silent_for(&self) -> Duration {
        if self.health.borrow().is_formed() {
            return Duration::ZERO;
        }
        self.pulse.age()
    }

    /// Figures after the latest step.
    pub fn stats(&self) -> watch::Receiver<Stats> {
        self.stats.clone()
    }

    /// Whether the group serves, now and later.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Takes the group for lost though the loop has not ended: it hangs.
    pub(crate) fn give_up(&self, reason: &str) {
        health::set(&self.health, Health::Lost(reason.to_owned()));
    }

    /// Why the group is lost, once it is.
    pub(crate) fn loss(&self) -> Option<String> {
        let health = self.health.borrow();
        health.reason().filter(|_| health.is_lost()).map(str::to_owned)
    }

    fn lost(&self) -> WorkerError {
        let reason = self.health.borrow().reason().map(str::to_owned);
        WorkerError::Group(reason.unwrap_or_else(|| "the engine has stopped".into()))
    }

    /// Ends the loop and waits for it and the ranks behind it: at most the steps in flight, within
    /// the executor's deadlines. A group that is being formed is not waited for: it has nothing to
    /// end in order. Blocks the calling thread.
    pub fn stop(&self) {
        // An error says that the loop has ended already.
        let _ended = self.commands.send(Command::Stop);
        self.pulse.stop();
        if self.health.borrow().is_formed() {
            return;
        }
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The loop catches its own panics and tells them as the failure.
            let _told = thread.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // The loop ends as well when the channel closes; this only wakes it earlier.
        let _ended = self.commands.send(Command::Stop);
        self.pulse.stop();
    }
}

/// One that says what it has cached.
fn new_scheduler(config: &SchedulerConfig) -> Scheduler {
    let mut scheduler = Scheduler::new(config.clone());
    // From the first call on changes are kept.
    scheduler.take_prefix_changes();
    scheduler
}

/// What the thread owns.
struct Core {
    config: SchedulerConfig,
    scheduler: Scheduler,
    executor: Box<dyn Executor>,
    inbox: Receiver<Command>,
    /// Requests received since `places` last heard of them.
    received: usize,
    /// When each plan in flight was launched, the oldest first, and when one finished last.
    launched: VecDeque<Instant>,
    finished: Instant,
    mailboxes: HashMap<SequenceId, Delivery>,
    places: Arc<Places>,
    prefixes: Arc<Prefixes>,
    pulse: Arc<Pulse>,
    positions_told: Option<Instant>,
    stats: watch::Sender<Stats>,
    /// The figures that the metrics have seen.
    last: Stats,
    metrics: Arc<Metrics>,
}

impl Core {
    fn run_to_end(mut self, health: &watch::Sender<Health>) {
        loop {
            let outcome = catch_unwind(AssertUnwindSafe(|| self.run()));
            let (reason, panicked) = match outcome {
                Ok(Ok(())) => return self.fail_all("the engine has stopped"),
                Ok(Err(reason)) => (reason, false),
                Err(panic) => (format!("the engine panicked: {}", panic_text(&*panic)), true),
            };
            tracing::error!(%reason, "group failed");
            self.metrics.group_failed();
            if !panicked {
                health::set(health, Health::Forms(reason.clone()));
            }
            self.fail_all(&reason);
            if !panicked && self.form_again().is_ok() {
                self.pulse.turn();
                health::set(health, Health::Serves);
                continue;
            }
            health::set(health, Health::Lost(reason));
            return;
        }
    }

    /// Everything that was asked of this engine ends for `reason`.
    fn fail_all(&mut self, reason: &str) {
        self.mailboxes.drain().for_each(|(_, mailbox)| mailbox.fail(reason));
        for command in self.inbox.try_iter() {
            if let Command::Submit { delivery, .. } = command {
                delivery.fail(reason);
            }
        }
    }

    /// A new group, and nothing that was planned for the old one.
    fn form_again(&mut self) -> Result<(), ExecutorError> {
        let pulse = Arc::clone(&self.pulse);
        let wanted = || !pulse.stops();
        self.executor.recover(&wanted).inspect_err(|error| {
            tracing::error!(%error, "the group is not formed anew");
        })?;
        self.scheduler = new_scheduler(&self.config);
        self.last = self.scheduler.stats();
        self.received = 0;
        self.launched.clear();
        self.positions_told = None;
        self.places.clear();
        self.prefixes.clear();
        self.stats.send_replace(self.last);
        Ok(())
    }

    /// Until stopped, or until the group fails with the reason given.
    fn run(&mut self) -> Result<(), String> {
        while self.take_commands()? {
            self.cancel_abandoned();
            self.step()?;
            self.publish();
        }
        Ok(())
    }

    /// Takes what waits in the inbox; with nothing else to do, waits for it. False is the end.
    fn take_commands(&mut self) -> Result<bool, String> {
        self.pulse.turn();
        while self.scheduler.is_idle() {
            match self.inbox.recv_timeout(IDLE_PERIOD) {
                Ok(Command::Submit { request, delivery }) => self.submit(*request, delivery),
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(false),
                Err(RecvTimeoutError::Timeout) => {
                    self.executor.idle().map_err(|error| error.0)?;
                }
            }
            self.pulse.turn();
        }
        loop {
            match self.inbox.try_recv() {
                Ok(Command::Submit { request, delivery }) => self.submit(*request, delivery),
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return Ok(false),
                Err(TryRecvError::Empty) => return Ok(true),
            }
        }
    }

    fn submit(&mut self, request: Request, delivery: Delivery) {
        self.received += 1;
        match self.scheduler.submit(request) {
            Ok(id) => {
                self.mailboxes.insert(id, delivery);
            }
            // Checked before it was accepted; should the two disagree, its reader hears of it.
            Err(error) => delivery.fail(&error.to_string()),
        }
    }

    fn cancel_abandoned(&mut self) {
        let scheduler = &mut self.scheduler;
        self.mailboxes.retain(|&id, mailbox| {
            let abandoned = mailbox.is_abandoned();
            if abandoned {
                scheduler.cancel(id);
            }
            !abandoned
        });
    }

    /// Launches what can be in flight, then takes over the oldest plan's output.
    fn step(&mut self) -> Result<(), String> {
        while self.launched.len() < self.executor.depth() {
            let plan = self.scheduler.schedule();
            self.settle();
            let Some(plan) = plan else { break };
            let admits = plan.chunks.iter().any(|chunk| chunk.admission.is_some());
            self.tell_positions(admits);
            self.launched.push_back(Instant::now());
            self.executor.launch(plan).map_err(|error| error.0)?;
        }
        let Some(launched) = self.launched.pop_front() else { return Ok(()) };
        let output = self.executor.finish().map_err(|error| error.0)?;
        // One that was launched behind another began when that one finished.
        let began = launched.max(std::mem::replace(&mut self.finished, Instant::now()));
        let took = self.finished - began;
        self.metrics.step(took);
        self.scheduler.measure(took);
        let updates = self.scheduler.commit(output).map_err(|error| error.to_string())?;
        // Before readers hear of an end: they may send the next request at once.
        self.places.open(updates.iter().filter(|update| update.end.is_some()).count());
        for update in updates {
            let Some(mailbox) = self.mailboxes.get(&update.sequence) else { continue };
            let (id, ended) = (update.sequence, update.end.is_some());
            mailbox.put(update);
            if ended {
                self.mailboxes.remove(&id);
            }
        }
        Ok(())
    }

    /// Says how far each sequence has come: now and then, and before a step that admits some.
    fn tell_positions(&mut self, admits: bool) {
        if !admits && self.positions_told.is_some_and(|told| told.elapsed() < POSITIONS_PERIOD) {
            return;
        }
        self.positions_told = Some(Instant::now());
        for (id, position) in self.scheduler.positions() {
            if let Some(mailbox) = self.mailboxes.get(&id) {
                mailbox.set_position(position);
            }
        }
    }

    fn settle(&mut self) {
        let Stats { waiting, running, .. } = self.scheduler.stats();
        self.places.settle(std::mem::take(&mut self.received), waiting, running);
    }

    fn publish(&mut self) {
        self.prefixes.note(self.scheduler.take_prefix_changes());
        let stats = self.scheduler.stats();
        self.metrics.observe(&self.last, &stats);
        self.last = stats;
        self.stats.send_if_modified(|known| std::mem::replace(known, stats) != stats);
    }
}
