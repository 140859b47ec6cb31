//! When requests begin, and what became of them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{sleep_until, timeout},
};

use super::request::{Prompts, Sample, Target, unit};
use crate::progress::{ProgressReport, Unit};

/// A run, fully described.
pub struct Load {
    pub target: Arc<Target>,
    pub prompts: Prompts,
    pub requests: usize,
    pub concurrency: usize,
    /// Arrivals a second.
    pub rate: Option<f64>,
    pub output_tokens: u32,
    pub deadline: Duration,
}

/// What a run left.
pub struct Measured {
    pub samples: Vec<Sample>,
    pub errors: Vec<String>,
    pub wall: Duration,
    /// Whether every request was made.
    pub complete: bool,
}

impl Load {
    /// Makes the requests. Ctrl-C ends the run early; what was measured counts.
    pub async fn run(&self) -> Result<Measured> {
        let places = Arc::new(Semaphore::new(self.concurrency));
        let mut running = JoinSet::new();
        let mut progress = ProgressReport::new("requests", Unit::Items, self.requests as u64);
        let (mut samples, mut errors) = (Vec::with_capacity(self.requests), Vec::new());
        let began = Instant::now();
        let (mut next, mut arrival) = (0, began);
        let interrupted = tokio::signal::ctrl_c();
        tokio::pin!(interrupted);
        while samples.len() + errors.len() < self.requests {
            tokio::select! {
                _ = &mut interrupted => break,
                Some(done) = running.join_next() => {
                    match done? {
                        Ok(sample) => samples.push(sample),
                        Err(reason) => errors.push(reason),
                    }
                    progress.add(1);
                }
                place = Self::place(&places, arrival), if next < self.requests => {
                    let place = place?;
                    arrival = self.following(arrival, next);
                    let request = self.request(next);
                    running.spawn(async move {
                        let outcome = request.await;
                        drop(place);
                        outcome
                    });
                    next += 1;
                }
            }
        }
        let complete = samples.len() + errors.len() == self.requests;
        Ok(Measured { samples, errors, wall: began.elapsed(), complete })
    }

    /// Waits for the moment of arrival, then for room.
    async fn place(
        places: &Arc<Semaphore>,
        arrival: Instant,
    ) -> Result<tokio::sync::OwnedSemaphorePermit> {
        sleep_until(arrival.into()).await;
        Ok(places.clone().acquire_owned().await?)
    }

    /// The arrival after this one: at once, or after an exponentially distributed pause.
    fn following(&self, arrival: Instant, number: usize) -> Instant {
        let Some(rate) = self.rate else { return arrival };
        let draw = unit(self.prompts.seed ^ 0x9e37_79b9, number as u64);
        arrival + Duration::from_secs_f64(-(1.0 - draw).ln() / rate)
    }

    fn request(
        &self,
        number: usize,
    ) -> impl Future<Output = Result<Sample, String>> + Send + 'static {
        let (target, deadline) = (self.target.clone(), self.deadline);
        let (prompt, tokens) = (self.prompts.prompt(number as u64), self.output_tokens);
        async move {
            match timeout(deadline, target.request(prompt, tokens)).await {
                Ok(Ok(sample)) => Ok(sample),
                Ok(Err(error)) => Err(format!("{error:#}")),
                Err(_) => Err(format!("no end within {} s", deadline.as_secs())),
            }
        }
    }
}
