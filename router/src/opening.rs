//! Finds a worker that takes a sequence: tries, stands in line, waits for one that loads.

use crate::{
    RouterError,
    config::Deadlines,
    link::Link,
    placement::{Order, Placement, Refusal},
    policy::{RouteKey, Target},
    queue::Ticket,
    targets::Changes,
    upstream::Upstream,
    version::Version,
};
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, sleep};

/// Between two looks at workers that rest, unless something changes earlier.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How long a request waits while no worker of its model takes it.
pub(crate) struct Patience {
    started: Instant,
    /// For one whose answer has begun: a successor may be starting without having said so.
    under_way: bool,
    /// A worker was seen loading.
    loading: bool,
}

impl Patience {
    pub fn new(under_way: bool) -> Self {
        Self { started: Instant::now(), under_way, loading: false }
    }

    /// Until when to wait, given who is there now. One that loads is worth a longer wait.
    pub fn until(&mut self, now: Option<&Version>, deadlines: &Deadlines) -> Instant {
        self.loading |= now.is_some_and(Version::loads);
        let limit = match now.is_some_and(Version::is_listed) {
            _ if self.under_way || self.loading => deadlines.loading,
            true => deadlines.open.max(deadlines.ready),
            false => deadlines.ready,
        };
        self.started + limit
    }
}

/// The search for a worker.
pub(crate) struct Opening<'a> {
    upstream: &'a Arc<Upstream>,
    order: Order<'a>,
    key: &'a RouteKey,
    /// It ran before: it does not stand in line behind those that never began.
    under_way: bool,
    /// Full when last asked.
    full: Vec<Arc<Link>>,
    ticket: Option<Ticket>,
    /// Running while nobody that is there answers.
    patience: Option<Patience>,
    last_fault: Option<String>,
    changes: Changes,
}

impl<'a> Opening<'a> {
    pub fn new(
        upstream: &'a Arc<Upstream>,
        order: Order<'a>,
        key: &'a RouteKey,
        under_way: bool,
    ) -> Self {
        let (full, ticket, patience, last_fault) = (Vec::new(), None, None, None);
        let changes = upstream.targets.changes();
        Self { upstream, order, key, under_way, full, ticket, patience, last_fault, changes }
    }

    /// Errors: `Overloaded`, `Unavailable` after the deadline for opening, what the client got
    /// wrong.
    pub async fn run(mut self) -> Result<Placement, RouterError> {
        if !self.under_way && !self.order.model.line.is_empty() {
            self.line_up().await?;
        }
        loop {
            let now = self.upstream.targets.now();
            let version = now.version(self.order.model);
            let candidates = version.map(|version| version.candidates(self.key, &self.full));
            let (links, targets): (Vec<Arc<Link>>, Vec<Target>) =
                candidates.unwrap_or_default().into_iter().unzip();
            match self.upstream.policy.pick(self.key, &targets) {
                Some(at) => {
                    if let Some(placement) = self.ask(&links[at]).await? {
                        return Ok(placement);
                    }
                    self.upstream.metrics.retries.inc();
                }
                None if !self.full.is_empty() => self.line_up().await?,
                None => self.wait_for_worker(version).await?,
            }
        }
    }

    async fn ask(&mut self, link: &Arc<Link>) -> Result<Option<Placement>, RouterError> {
        match Placement::ask(link, &self.order, self.upstream.deadlines.connect).await {
            Ok(placement) => Ok(Some(placement)),
            Err(Refusal::Fatal(error)) => Err(error),
            Err(Refusal::Full) => {
                self.full.push(link.clone());
                self.patience = None;
                Ok(None)
            }
            Err(Refusal::Broken(reason)) => {
                let (worker, address) = (link.id(), link.address());
                tracing::warn!(worker, address, reason, "worker did not take the sequence");
                self.upstream.failed(link);
                self.last_fault = Some(format!("{worker}: {reason}"));
                let now = self.upstream.targets.now();
                self.check_patience(now.version(self.order.model))?;
                Ok(None)
            }
        }
    }

    /// Stands in line until it is time to try again.
    async fn line_up(&mut self) -> Result<(), RouterError> {
        self.full.clear();
        let ticket = match self.ticket.take() {
            Some(ticket) => {
                ticket.stay();
                ticket
            }
            None => Ticket::take(self.upstream, &self.order, self.under_way)?,
        };
        self.ticket.insert(ticket).turn().await
    }

    async fn wait_for_worker(&mut self, now: Option<&Version>) -> Result<(), RouterError> {
        self.check_patience(now)?;
        tokio::select! {
            () = self.changes.next() => {}
            () = sleep(LOOK_AGAIN) => {}
        }
        Ok(())
    }

    fn check_patience(&mut self, now: Option<&Version>) -> Result<(), RouterError> {
        let patience = self.patience.get_or_insert_with(|| Patience::new(self.under_way));
        if Instant::now() < patience.until(now, &self.upstream.deadlines) {
            return Ok(());
        }
        let mut reason = match now {
            Some(version) => version.shortage(),
            None => format!("the workers of '{}' are gone", self.order.model.name),
        };
        if let Some(fault) = &self.last_fault {
            reason += &format!("; last {fault}");
        }
        Err(RouterError::Unavailable(reason))
    }
}
