//! One request, over HTTP or gRPC, and its timings.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, Response, body::Bytes, body::Incoming, header::CONTENT_TYPE};
use proto::v1::{
    GenerateRequest, ListModelsRequest, Sampling, TokenIds, generate_request::Prompt,
    inference_client::InferenceClient,
};
use serde_json::{Value, json};
use tonic::transport::Channel;

use crate::{
    client::{self, Http},
    security::ToolTlsArgs,
};

/// Bytes of an answer that is no stream, at most.
const BODY_BYTES_MAX: usize = 4 << 20;
/// Bytes of one event of a stream, at most.
const EVENT_BYTES_MAX: usize = 4 << 20;

/// Prompts that are the same for the same seed and number.
#[derive(Clone, Copy)]
pub struct Prompts {
    pub tokens: usize,
    pub shared: usize,
    pub groups: u64,
    pub vocab: u32,
    pub seed: u64,
}

impl Prompts {
    /// The ids of request `number`.
    pub fn prompt(&self, number: u64) -> Vec<u32> {
        let group = self.seed ^ (number % self.groups) << 20 ^ 1 << 60;
        let own = self.seed ^ number << 20;
        let id = |key: u64, at: usize| (mix(key, at as u64) % u64::from(self.vocab)) as u32;
        let ids = |at| if at < self.shared { id(group, at) } else { id(own, at) };
        (0..self.tokens).map(ids).collect()
    }
}

/// SplitMix64 of two keys.
fn mix(key: u64, at: u64) -> u64 {
    let mut x = key.wrapping_mul(0xd134_2543_de82_ef95) ^ at.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for multiplier in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
        x = (x ^ x >> 30).wrapping_mul(multiplier);
    }
    x ^ x >> 31
}

/// A draw from [0, 1).
pub fn unit(key: u64, at: u64) -> f64 {
    (mix(key, at) >> 11) as f64 / (1u64 << 53) as f64
}

/// What one request showed.
pub struct Sample {
    /// Until the first tokens came.
    pub first: Duration,
    /// Until everything was there.
    pub whole: Duration,
    /// Between messages that brought tokens.
    pub gaps: Vec<Duration>,
    pub tokens: u64,
    pub cached_tokens: u64,
}

/// A stopwatch over the messages of one answer.
struct Watch {
    began: Instant,
    last: Option<Instant>,
    first: Duration,
    gaps: Vec<Duration>,
}

impl Watch {
    fn start() -> Self {
        Self { began: Instant::now(), last: None, first: Duration::ZERO, gaps: Vec::new() }
    }

    fn tokens_came(&mut self) {
        let now = Instant::now();
        match self.last.replace(now) {
            Some(last) => self.gaps.push(now - last),
            None => self.first = now - self.began,
        }
    }

    fn stop(self, tokens: u64, cached_tokens: u64) -> Result<Sample> {
        if self.last.is_none() {
            bail!("the answer had no tokens");
        }
        let Self { began, first, gaps, .. } = self;
        Ok(Sample { first, whole: began.elapsed(), gaps, tokens, cached_tokens })
    }
}

/// Where requests go.
pub struct Target {
    pub model: String,
    door: Door,
}

enum Door {
    Http { client: Box<Http>, base: String },
    Grpc(InferenceClient<Channel>),
}

impl Target {
    /// Connects and asks for the model's name where none is given.
    pub async fn open(url: &str, model: Option<String>, tls: &ToolTlsArgs) -> Result<Self> {
        let door = match url.split_once("://") {
            Some(("http" | "https", _)) => {
                let client = Box::new(client::http(url, tls)?);
                Door::Http { client, base: url.trim_end_matches('/').to_owned() }
            }
            Some(("grpc", rest)) => {
                Door::Grpc(client::connect(&format!("http://{rest}"), tls).await?)
            }
            Some(("grpcs", rest)) => {
                Door::Grpc(client::connect(&format!("https://{rest}"), tls).await?)
            }
            _ => bail!("--url {url} is neither http://HOST:PORT nor grpc://HOST:PORT"),
        };
        let model = match model {
            Some(model) => model,
            None => door.first_model().await?,
        };
        Ok(Self { model, door })
    }

    /// Sends one prompt and reads the whole answer.
    pub async fn request(&self, prompt: Vec<u32>, tokens: u32) -> Result<Sample> {
        match &self.door {
            Door::Http { client, base } => {
                let body = json!({
                    "model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
                    "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
                });
                let request = Request::post(format!("{base}/v1/completions"))
                    .header(CONTENT_TYPE, "application/json")
                    .body(Full::new(Bytes::from(body.to_string())))?;
                let watch = Watch::start();
                read_events(client.request(request).await?, watch).await
            }
            Door::Grpc(client) => {
                let sampling = Sampling {
                    max_tokens: Some(tokens),
                    temperature: Some(0.0),
                    ignore_eos: true,
                    ..Sampling::default()
                };
                let request = GenerateRequest {
                    model: self.model.clone(),
                    prompt: Some(Prompt::Ids(TokenIds { ids: prompt })),
                    sampling: Some(sampling),
                    ..GenerateRequest::default()
                };
                read_messages(client.clone(), request).await
            }
        }
    }
}

impl Door {
    async fn first_model(&self) -> Result<String> {
        let nothing = || anyhow!("the router serves no model yet; is a worker ready?");
        match self {
            Self::Http { client, base } => {
                let request = Request::get(format!("{base}/v1/models")).body(Full::default())?;
                let answer = client
                    .request(request)
                    .await
                    .with_context(|| format!("no router at {base}; start one: lockstep up"))?;
                let listed: Value = serde_json::from_slice(&whole(answer).await?)?;
                let id = listed.pointer("/data/0/id").and_then(Value::as_str);
                id.map(str::to_owned).ok_or_else(nothing)
            }
            Self::Grpc(client) => {
                let listed = client.clone().list_models(ListModelsRequest {}).await;
                let models = listed.map_err(client::explain)?.into_inner().models;
                models.into_iter().next().map(|model| model.id).ok_or_else(nothing)
            }
        }
    }
}

async fn whole(answer: Response<Incoming>) -> Result<Bytes> {
    let body = Limited::new(answer.into_body(), BODY_BYTES_MAX).collect().await;
    Ok(body.map_err(|error| anyhow!("the answer broke off: {error}"))?.to_bytes())
}

/// Reads a stream of server-sent events.
async fn read_events(answer: Response<Incoming>, mut watch: Watch) -> Result<Sample> {
    let status = answer.status();
    if !status.is_success() {
        let body = whole(answer).await?;
        let error: Value = serde_json::from_slice(&body).unwrap_or_default();
        let message = error.pointer("/error/message").and_then(Value::as_str).unwrap_or_default();
        bail!("{status}: {message}");
    }
    let (mut body, mut held) = (answer.into_body(), Vec::new());
    let (mut tokens, mut cached, mut done) = (0, 0, false);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        held.extend_from_slice(&data);
        let mut brought = false;
        let mut from = 0;
        while let Some(end) = held[from..].iter().position(|&byte| byte == b'\n') {
            let line = &held[from..from + end];
            from += end + 1;
            let Some(data) = line.strip_prefix(b"data:") else { continue };
            if data.trim_ascii() == b"[DONE]" {
                done = true;
                continue;
            }
            let event: Value = serde_json::from_slice(data).context("an event is no JSON")?;
            if let Some(error) = event.pointer("/error/message").and_then(Value::as_str) {
                bail!("{error}");
            }
            brought |= event.pointer("/choices/0").is_some();
            let count = |at: &str| event.pointer(at).and_then(Value::as_u64);
            tokens = count("/usage/completion_tokens").unwrap_or(tokens);
            cached = count("/usage/prompt_tokens_details/cached_tokens").unwrap_or(cached);
        }
        held.drain(..from);
        if held.len() > EVENT_BYTES_MAX {
            bail!("an event is longer than {EVENT_BYTES_MAX} bytes");
        }
        if brought {
            watch.tokens_came();
        }
    }
    if !done {
        bail!("the stream ended early");
    }
    watch.stop(tokens, cached)
}

async fn read_messages(
    mut client: InferenceClient<Channel>,
    request: GenerateRequest,
) -> Result<Sample> {
    let mut watch = Watch::start();
    let opened = client.generate(request).await.map_err(client::explain)?;
    let mut stream = opened.into_inner();
    let (mut tokens, mut cached) = (0, 0);
    while let Some(message) = stream.message().await.map_err(client::explain)? {
        if !message.tokens.is_empty() {
            watch.tokens_came();
        }
        if let Some(usage) = message.usage {
            tokens = u64::from(usage.completion_tokens);
            cached = u64::from(usage.cached_tokens);
        }
    }
    watch.stop(tokens, cached)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_share_what_they_should_and_nothing_else() {
        let prompts = Prompts { tokens: 64, shared: 16, groups: 2, vocab: 1000, seed: 7 };
        let [a, b, c] = [0, 1, 2].map(|number| prompts.prompt(number));
        assert_eq!(a[..16], c[..16]);
        assert_ne!(a[..16], b[..16]);
        assert_ne!(a[16..], c[16..]);
        assert_eq!(a, prompts.prompt(0));
        assert!(a.iter().chain(&b).all(|&id| id < 1000));
        let mean = (0..10_000).map(|at| unit(3, at)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
    }
}
