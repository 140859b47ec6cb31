//! `lockstep pull`: fetches a model and prints where it is.

use anyhow::{Result, bail};
use clap::Args;

use crate::source;

/// Flags of `pull`.
#[derive(Args)]
pub struct PullArgs {
    /// A short name, org/name[:file], modelscope:org/name[:file], demo, or a path
    name: Option<String>,
    /// Shows the short names
    #[arg(long, env = "LOCKSTEP_LIST")]
    list: bool,
}

pub fn main(args: PullArgs) -> Result<()> {
    match (args.name, args.list) {
        (_, true) => crate::print(source::listing()),
        (Some(name), false) => crate::print(source::resolve(&name)?.display()),
        (None, false) => bail!("name a model; `lockstep pull --list` shows short names"),
    }
}
