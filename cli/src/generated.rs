//! What is made out of the flags' definitions: completions for shells, and man pages.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate};

use crate::Cli;

/// Flags of `completions`.
#[derive(Args)]
pub struct CompletionsArgs {
    /// The shell; `source <(lockstep completions bash)` puts them to use at once
    shell: Shell,
}

pub fn completions(args: CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    generate(args.shell, &mut Cli::command(), "lockstep", &mut script);
    crate::print(String::from_utf8(script)?.trim_end())
}

/// Flags of `man`.
#[derive(Args)]
pub struct ManArgs {
    /// A folder, made if absent; with ~/.local/share/man/man1 `man lockstep` finds the pages
    folder: PathBuf,
}

pub fn man(args: ManArgs) -> Result<()> {
    let folder = &args.folder;
    let unwritable = || format!("cannot write man pages to {}", folder.display());
    fs::create_dir_all(folder).with_context(unwritable)?;
    clap_mangen::generate_to(Cli::command(), folder).with_context(unwritable)
}
