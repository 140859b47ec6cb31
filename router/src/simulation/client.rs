//! A client that checks every token of its answer.

use super::{
    Draw,
    worker::{POISON, logprob, token},
    world::World,
};
use crate::{
    queue::Standing,
    trace::Trace,
    upstream::{Received, UpstreamStream},
};
use proto::v1::{Finish, RunRequest};
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, sleep, timeout};

/// No request takes longer: workers fail for half a minute only.
const LIMIT: Duration = Duration::from_secs(900);

/// How a request ended.
pub enum End {
    Whole,
    Cancelled,
    Failed(String),
}

pub struct Client {
    request: RunRequest,
    priority: i32,
    /// After the beginning.
    at: Duration,
    /// It leaves once it has so many tokens.
    leaves: Option<usize>,
    /// It reads no faster than one message in this time.
    pause: Duration,
}

impl Client {
    pub fn new(at: u64, draw: &mut Draw) -> Self {
        let length = 1 + draw.below(40);
        let mut prompt: Vec<u32> = (0..length).map(|_| draw.below(1000) as u32).collect();
        if draw.one_in(200) {
            prompt[0] = POISON;
        }
        let stop_ids = if draw.one_in(3) { (0..100).collect() } else { Vec::new() };
        let request = RunRequest {
            request_id: format!("request {at}"),
            prompt,
            max_tokens: 1 + draw.below(24) as u32,
            stop_ids,
            score_prompt: draw.one_in(5),
            ..RunRequest::default()
        };
        let leaves = draw.one_in(8).then(|| draw.below(8) as usize);
        let pause = if draw.one_in(6) { draw.time(3000) } else { Duration::ZERO };
        let priority = draw.below(3) as i32 - 1;
        Self { request, priority, at: draw.time(20_000), leaves, pause }
    }

    pub async fn run(self, world: Arc<World>) -> End {
        sleep(self.at).await;
        let name = self.request.request_id.clone();
        if let Ok(end) = timeout(LIMIT, self.read(&world)).await {
            return end;
        }
        world.violation(format!("{name} did not end within {LIMIT:?}"));
        End::Failed("a hang".to_owned())
    }

    async fn read(self, world: &World) -> End {
        let upstream = &world.upstream;
        let model = world.model().await;
        if self.request.prompt.contains(&POISON) {
            world.poisoned();
        }
        let (trace, request) = (Trace::default(), self.request.clone());
        let fingerprint = model.fingerprint.clone();
        let standing = Standing { priority: self.priority, until: Instant::now() + LIMIT };
        let mut stream = UpstreamStream::new(upstream.clone(), model, trace, standing, request);
        let mut check =
            Check { request: &self.request, fingerprint, scores: 0, tokens: Vec::new() };
        loop {
            if self.leaves.is_some_and(|count| check.tokens.len() >= count) {
                return End::Cancelled;
            }
            sleep(self.pause).await;
            let received = match stream.next().await {
                Ok(Some(received)) => received,
                Ok(None) => {
                    world.violation(format!("{} ended without a finish", self.request.request_id));
                    return End::Failed("no finish".to_owned());
                }
                Err(error) => {
                    let begun = !check.tokens.is_empty();
                    return world.failure(&self.request.request_id, begun, &error);
                }
            };
            let ends = received.finish.is_some();
            if let Err(wrong) = check.take(received) {
                world.violation(format!("{}: {wrong}", self.request.request_id));
            }
            world.check_bounds();
            if ends {
                break;
            }
        }
        if !matches!(stream.next().await, Ok(None)) {
            world.violation(format!("{} goes on after its finish", self.request.request_id));
        }
        End::Whole
    }
}

/// What has come of an answer.
struct Check<'a> {
    request: &'a RunRequest,
    fingerprint: String,
    scores: usize,
    tokens: Vec<u32>,
}

impl Check<'_> {
    fn take(&mut self, received: Received) -> Result<(), String> {
        let RunRequest { prompt, stop_ids, max_tokens, score_prompt, .. } = self.request;
        for score in received.prompt {
            self.scores += 1;
            if !score_prompt || prompt.get(self.scores) != Some(&score.id) {
                return Err(format!("score {} is of another token", self.scores));
            }
        }
        for info in received.tokens {
            let position = prompt.len() + self.tokens.len();
            let wanted = token(&self.fingerprint, prompt, position);
            if (info.id, info.logprob) != (wanted, Some(logprob(wanted))) {
                return Err(format!("token {} is {}, not {wanted}", self.tokens.len(), info.id));
            }
            if self.tokens.last().is_some_and(|last| stop_ids.contains(last)) {
                return Err("it goes on after its stop".to_owned());
            }
            self.tokens.push(info.id);
        }
        let count = self.tokens.len();
        let stopped = self.tokens.last().is_some_and(|last| stop_ids.contains(last));
        let right = match received.finish {
            Some(Finish::Stop) => stopped,
            Some(Finish::Length) => count == *max_tokens as usize,
            Some(Finish::None) => false,
            None => return Ok(()),
        };
        if *score_prompt && self.scores + 1 != prompt.len() {
            return Err(format!("{} scores of {} tokens", self.scores, prompt.len()));
        }
        if right { Ok(()) } else { Err(format!("{:?} after {count}", received.finish)) }
    }
}
