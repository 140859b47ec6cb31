//! `lockstep run`: one generation without a server.

use std::{
    fmt,
    io::{Write, stdout},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::Args;
use engine::plan::{SamplingParams, TokenLogprob};
use serde::Serialize;
use text::{FinishReason, Language, Piece, Reader, Stops};
use worker::RankMode;

use crate::args::GroupArgs;
use crate::direct::{self, Direct};
use crate::load;
use crate::logits::LogitsFile;
use crate::sampling::SamplingArgs;

/// Flags of `run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    group: GroupArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// New tokens, at most
    #[arg(long, default_value_t = 128, env = "LOCKSTEP_MAX_TOKENS")]
    max_tokens: usize,
    /// Goes on past the model's end-of-text tokens
    #[arg(long, env = "LOCKSTEP_IGNORE_EOS")]
    ignore_eos: bool,
    /// Ends before this text; may be given several times
    #[arg(long, env = "LOCKSTEP_STOP")]
    stop: Vec<String>,
    /// Ends after any of these tokens
    #[arg(long, value_delimiter = ',', env = "LOCKSTEP_STOP_IDS")]
    stop_ids: Vec<u32>,
    /// The prompt comes back before the answer
    #[arg(long, env = "LOCKSTEP_ECHO")]
    echo: bool,
    /// Prints one JSON object with token_ids, text, finish_reason and logprobs
    #[arg(long, env = "LOCKSTEP_JSON")]
    json: bool,
    /// Writes float32 `logits` [T, V] of every prompt position to this safetensors file
    #[arg(long, env = "LOCKSTEP_LOGITS_OUT")]
    logits_out: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct PromptArgs {
    /// Text to continue
    #[arg(long, env = "LOCKSTEP_PROMPT")]
    prompt: Option<String>,
    /// Token ids to continue, with commas between
    #[arg(long, value_delimiter = ',', env = "LOCKSTEP_PROMPT_IDS")]
    prompt_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct RunOutput {
    token_ids: Vec<u32>,
    text: String,
    finish_reason: &'static str,
    logprobs: Option<Vec<Logprob>>,
}

#[derive(Serialize)]
struct Logprob {
    token: u32,
    logprob: f32,
    top: Vec<(u32, f32)>,
}

pub fn main(args: RunArgs) -> Result<()> {
    // Everything that can be refused is, before the weights are loaded.
    let (plan, language) = load::plan(args.group.resolve(RankMode::Threads)?)?;
    let info = plan.info();
    let prompt = match (&args.prompt.prompt, &args.prompt.prompt_ids) {
        (Some(text), _) => language
            .encode(text)
            .context("--prompt needs the model's tokenizer; --prompt-ids does without")?,
        (None, ids) => ids.clone().unwrap_or_default(),
    };
    let params = args.sampling.resolve(&language.defaults().params, info.vocab)?;
    Stops::check(&args.stop, &args.stop_ids, info.vocab).map_err(|error| {
        let flag = if error.parameter() == Some("stop") { "--stop" } else { "--stop-ids" };
        anyhow::Error::new(error).context(flag)
    })?;
    direct::check(info, &prompt, args.max_tokens)?;
    let mut direct = Direct::new(load::group(plan)?)?;
    if let Some(path) = &args.logits_out {
        let mut file = LogitsFile::create(path, prompt.len(), direct.info.vocab)?;
        direct.logits(&prompt, &params, |rows| file.write(rows))?;
        file.finish()?;
    }
    let mut answer = Answer::new(&args, &language, &prompt);
    answer.show(&answer.output.text)?;
    let timings = generate(&mut direct, &args, &prompt, &params, &mut answer)?;
    let answer = answer.finish()?;
    if args.json {
        crate::print(serde_json::to_string(&answer)?)?;
    } else {
        crate::print("")?;
    }
    eprintln!("{timings}");
    Ok(())
}

fn generate(
    direct: &mut Direct,
    args: &RunArgs,
    prompt: &[u32],
    params: &SamplingParams,
    answer: &mut Answer,
) -> Result<Timings> {
    let start = Instant::now();
    let (mut first, mut tokens) = (None, 0);
    direct.generate(prompt, params, args.max_tokens, |token| {
        first.get_or_insert_with(|| start.elapsed());
        tokens += 1;
        answer.accept(token)
    })?;
    let first = first.unwrap_or_default();
    Ok(Timings { prompt: prompt.len(), first, tokens, rest: start.elapsed() - first })
}

/// How long the parts of a generation took.
struct Timings {
    /// Tokens.
    prompt: usize,
    /// From the start to the first token.
    first: Duration,
    /// Tokens of the answer.
    tokens: usize,
    /// From the first token to the last.
    rest: Duration,
}

impl fmt::Display for Timings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { prompt, first, tokens, rest } = self;
        let rate = |tokens: usize, time: &Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        let (first_seconds, prefill) = (first.as_secs_f64(), rate(*prompt, first));
        write!(f, "{prompt} tokens prefill {prefill:.1} tok/s ({first_seconds:.3} s)")?;
        if *tokens > 1 {
            let (seconds, decode) = (rest.as_secs_f64(), rate(tokens - 1, rest));
            write!(f, ", {tokens} tokens decode {decode:.1} tok/s ({seconds:.3} s)")?;
        }
        Ok(())
    }
}

/// Shows the answer as it comes, collects it, and knows when it ends.
struct Answer {
    stop_ids: Vec<u32>,
    reader: Reader<TokenLogprob>,
    /// Text is shown as it comes, where no JSON is to follow.
    shown: bool,
    has_text: bool,
    ended: bool,
    output: RunOutput,
}

impl Answer {
    fn new(args: &RunArgs, language: &Language, prompt: &[u32]) -> Self {
        let stops = Stops::new(args.stop.clone(), |text| language.special_token(text));
        let mut stop_ids = args.stop_ids.clone();
        stop_ids.extend(stops.named.iter().map(|(id, _)| id));
        if !args.ignore_eos {
            stop_ids.extend(&language.defaults().eos_ids);
        }
        let text = match (args.echo, &args.prompt.prompt) {
            (true, Some(text)) => text.clone(),
            (true, None) => {
                let mut decoder = language.decoder();
                let text: String = prompt.iter().map(|&id| decoder.push(id)).collect();
                text + &decoder.finish()
            }
            (false, _) => String::new(),
        };
        let output = RunOutput {
            token_ids: if args.echo { prompt.to_vec() } else { Vec::new() },
            text,
            finish_reason: FinishReason::Length.as_str(),
            logprobs: args.sampling.logprobs.map(|_| Vec::new()),
        };
        Self {
            stop_ids,
            reader: Reader::new(language.decoder(), stops),
            shown: !args.json,
            has_text: language.vocab_size() > 0,
            ended: false,
            output,
        }
    }

    /// Takes one token; false ends the answer.
    fn accept(&mut self, token: TokenLogprob) -> Result<bool> {
        let id = token.token;
        let mut piece = Piece::default();
        self.ended = if self.stop_ids.contains(&id) {
            self.reader.finish(Some((id, token)), &mut piece);
            true
        } else {
            self.reader.push(id, token, &mut piece)
        };
        if self.ended {
            self.output.finish_reason = FinishReason::Stop.as_str();
        }
        self.take(piece)?;
        Ok(!self.ended)
    }

    fn take(&mut self, piece: Piece<TokenLogprob>) -> Result<()> {
        self.show(&piece.text)?;
        self.output.text += &piece.text;
        for text::Token { info, end, .. } in piece.tokens {
            let TokenLogprob { token, logprob, top } = info;
            if !self.has_text && !end {
                self.show(&format!("{token} "))?;
            }
            self.output.token_ids.push(token);
            if let (Some(all), Some(logprob)) = (&mut self.output.logprobs, logprob) {
                all.push(Logprob { token, logprob, top });
            }
        }
        Ok(())
    }

    fn show(&self, text: &str) -> Result<()> {
        if self.shown && !text.is_empty() {
            let mut out = stdout().lock();
            out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("standard output")?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<RunOutput> {
        let mut piece = Piece::default();
        if !self.ended && self.reader.finish(None, &mut piece) {
            self.output.finish_reason = FinishReason::Stop.as_str();
        }
        self.take(piece)?;
        Ok(self.output)
    }
}
