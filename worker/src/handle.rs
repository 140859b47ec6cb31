//! The engine loop: one OS thread that owns the scheduler and the executor.
//!
//! Requests come in through a bounded channel, results go out through mailboxes that never make the
//! loop wait. A reader that is gone is a cancelled sequence: its blocks are free before the next
//! step. With nothing to do the thread sleeps, and wakes twice a second to tell the other ranks
//! that it lives.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use engine::{
    EngineError, Request, Scheduler, SchedulerConfig, Stats,
    plan::{Executor, SequenceId},
};
use tokio::sync::{oneshot, watch};

use crate::{
    WorkerError,
    mailbox::{Mailbox, Output},
    metrics::Metrics,
};

/// Requests on their way to the loop; it empties the channel before every step.
const COMMANDS_MAX: usize = 256;
/// Between two signs of life of an idle leader.
const IDLE_PERIOD: Duration = Duration::from_millis(500);

enum Command {
    Submit {
        request: Box<Request>,
        mailbox: Arc<Mailbox>,
        reply: oneshot::Sender<Result<(), EngineError>>,
    },
    Stop,
}

/// A running engine. Dropping it stops the loop and fails what still runs.
pub struct Engine {
    commands: SyncSender<Command>,
    stats: watch::Receiver<Stats>,
    failure: watch::Receiver<Option<String>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Starts the loop on a thread of its own. Fails when the system gives no thread.
    pub fn start(
        executor: Box<dyn Executor>,
        config: SchedulerConfig,
        metrics: Arc<Metrics>,
    ) -> Result<Self, WorkerError> {
        let scheduler = Scheduler::new(config);
        let (commands, inbox) = sync_channel(COMMANDS_MAX);
        let (stats_sender, stats) = watch::channel(scheduler.stats());
        let (failure_sender, failure) = watch::channel(None);
        metrics.observe(&Stats::default(), &scheduler.stats());
        let core = Core {
            last: scheduler.stats(),
            scheduler,
            executor,
            inbox,
            mailboxes: HashMap::new(),
            stats: stats_sender,
            metrics,
        };
        let thread = thread::Builder::new()
            .name("engine".into())
            .spawn(move || core.run_to_end(failure_sender))
            .map_err(WorkerError::io("starting the engine thread"))?;
        Ok(Self { commands, stats, failure, thread: Mutex::new(Some(thread)) })
    }

    /// Hands a request to the scheduler. The output's first update comes when the first result
    /// does.
    ///
    /// Errors: refused by the scheduler (`Engine`), or the group is lost (`Group`).
    pub async fn run(&self, request: Request) -> Result<Output, WorkerError> {
        let (mailbox, output) = Mailbox::open();
        let (reply, answer) = oneshot::channel();
        let command = Command::Submit { request: Box::new(request), mailbox, reply };
        match self.commands.try_send(command) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(EngineError::Overloaded(COMMANDS_MAX).into()),
            Err(TrySendError::Disconnected(_)) => return Err(self.lost()),
        }
        match answer.await {
            Ok(answer) => answer?,
            Err(_) => return Err(self.lost()),
        }
        Ok(output)
    }

    /// Figures after the latest step.
    pub fn stats(&self) -> watch::Receiver<Stats> {
        self.stats.clone()
    }

    /// Becomes `Some(reason)` when the group is lost.
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.failure.clone()
    }

    fn lost(&self) -> WorkerError {
        let reason = self.failure.borrow().clone();
        WorkerError::Group(reason.unwrap_or_else(|| "the engine has stopped".into()))
    }

    /// Ends the loop and waits for it and the ranks behind it: at most one step, within the
    /// executor's deadlines. Blocks the calling thread.
    pub fn stop(&self) {
        // An error says that the loop has ended already.
        let _ended = self.commands.send(Command::Stop);
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
        let _full = self.commands.try_send(Command::Stop);
    }
}

/// What the thread owns.
struct Core {
    scheduler: Scheduler,
    executor: Box<dyn Executor>,
    inbox: Receiver<Command>,
    mailboxes: HashMap<SequenceId, Arc<Mailbox>>,
    stats: watch::Sender<Stats>,
    /// The figures that the metrics have seen.
    last: Stats,
    metrics: Arc<Metrics>,
}

impl Core {
    fn run_to_end(mut self, failure: watch::Sender<Option<String>>) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.run()));
        let reason = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(reason)) => Some(reason),
            Err(panic) => Some(format!("the engine panicked: {}", crate::panic_text(&*panic))),
        };
        if let Some(reason) = &reason {
            tracing::error!(%reason, "group failed");
            self.metrics.group_failed();
        }
        let told = reason.as_deref().unwrap_or("the engine has stopped");
        for mailbox in self.mailboxes.values() {
            mailbox.fail(told);
        }
        failure.send_replace(reason);
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
        while self.scheduler.is_idle() {
            match self.inbox.recv_timeout(IDLE_PERIOD) {
                Ok(Command::Submit { request, mailbox, reply }) => {
                    self.submit(*request, mailbox, reply);
                }
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(false),
                Err(RecvTimeoutError::Timeout) => {
                    self.executor.idle().map_err(|error| error.0)?;
                }
            }
        }
        for _ in 0..COMMANDS_MAX {
            match self.inbox.try_recv() {
                Ok(Command::Submit { request, mailbox, reply }) => {
                    self.submit(*request, mailbox, reply);
                }
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return Ok(false),
                Err(TryRecvError::Empty) => break,
            }
        }
        Ok(true)
    }

    fn submit(
        &mut self,
        request: Request,
        mailbox: Arc<Mailbox>,
        reply: oneshot::Sender<Result<(), EngineError>>,
    ) {
        let outcome = self.scheduler.submit(request).map(|id| {
            self.mailboxes.insert(id, mailbox);
        });
        // Nobody waits for the answer when the caller has gone; the mailbox knows it too.
        let _gone = reply.send(outcome);
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

    fn step(&mut self) -> Result<(), String> {
        let Some(plan) = self.scheduler.schedule() else { return Ok(()) };
        let start = Instant::now();
        self.executor.submit(&plan).map_err(|error| error.0)?;
        let output = self.executor.collect().map_err(|error| error.0)?;
        let took = start.elapsed();
        self.metrics.step(took);
        self.scheduler.measure(took);
        for update in self.scheduler.commit(output).map_err(|error| error.to_string())? {
            let Some(mailbox) = self.mailboxes.get(&update.sequence) else { continue };
            let (id, ended) = (update.sequence, update.end.is_some());
            mailbox.put(update);
            if ended {
                self.mailboxes.remove(&id);
            }
        }
        Ok(())
    }

    fn publish(&mut self) {
        let stats = self.scheduler.stats();
        self.metrics.observe(&self.last, &stats);
        self.last = stats;
        self.stats.send_if_modified(|known| std::mem::replace(known, stats) != stats);
    }
}
