//! `lockstep perplexity`: how well a model predicts a text.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use engine::plan::SamplingParams;
use model::score::{Perplexity, windows};
use text::Language;
use worker::RankMode;

use crate::args::GroupArgs;
use crate::direct::Direct;
use crate::load;
use crate::progress::{ProgressReport, Unit};

/// Flags of `perplexity`.
#[derive(Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    group: GroupArgs,
    /// The text
    #[arg(long, env = "LOCKSTEP_FILE")]
    file: PathBuf,
    /// Prints one JSON object
    #[arg(long, env = "LOCKSTEP_JSON")]
    json: bool,
}

/// Tokens of a window where `--context` does not say.
const WINDOW: usize = 512;

pub fn main(args: PerplexityArgs) -> Result<()> {
    let text = fs::read_to_string(&args.file)
        .with_context(|| format!("cannot read --file {}", args.file.display()))?;
    let mut config = args.group.resolve(RankMode::Threads)?;
    let context = config.context_max.unwrap_or(WINDOW);
    config.context_max = Some(context);
    let (plan, language) = load::plan(config)?;
    let plain = language.encode_ordinary(&text)?;
    let (tokens, bos) = with_bos(&language, &text, plain)?;
    let windows = windows(&tokens, context, bos)?;
    let mut direct = Direct::new(load::group(plan)?)?;
    let mut perplexity = Perplexity::new(context);
    let mut progress = ProgressReport::new("windows", Unit::Items, windows.len() as u64);
    // Only the distribution itself is wanted.
    let plain = SamplingParams { logprobs: Some(0), ..SamplingParams::GREEDY };
    for window in &windows {
        perplexity.add(&direct.score(window, &plain)?)?;
        progress.add(1);
    }
    drop(progress);
    let Some(value) = perplexity.value() else { bail!("no tokens were scored") };
    let (error, count) = (perplexity.error().unwrap_or(0.0), perplexity.count());
    if args.json {
        let windows = windows.len();
        let summary = serde_json::json!({
            "perplexity": value, "error": error, "tokens": count, "windows": windows,
            "context": context,
        });
        crate::print(summary)?;
    } else {
        crate::print(format_args!(
            "perplexity {value:.4} ± {error:.4} ({count} tokens, context {context})"
        ))?;
    }
    Ok(())
}

/// The text's tokens as the model wants them, and its beginning-of-text token where it has one.
fn with_bos(language: &Language, text: &str, plain: Vec<u32>) -> Result<(Vec<u32>, Option<u32>)> {
    let tokens = language.encode_literal(text)?;
    let added = tokens.len().saturating_sub(plain.len());
    let bos = (added > 0).then(|| tokens.first().copied()).flatten();
    Ok((tokens, bos))
}
