//! The configuration file: what it says takes the place of the flags' built-in defaults.
//!
//! There is no second reading of values: the file's are handed to clap as defaults before it
//! parses, so a flag wins over its environment variable, that over the file, and the file over the
//! built-in default. Keys are the flags' long names, in a section for each command; flags of every
//! command stand above the sections.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::{
    Arg, ArgAction, Command, CommandFactory, FromArgMatches,
    error::{ContextKind, ContextValue},
};
use toml::{Table, Value};

use crate::{Cli, source::distance};

/// Bytes of a file, at most.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why there is nothing to run.
#[derive(Debug)]
pub enum Fault {
    /// What clap says, help and version included.
    Usage(clap::Error),
    /// The file cannot be used.
    File(anyhow::Error),
}

/// Reads the command line, the environment and, where one of them names it, the file.
pub fn parse(words: &[OsString]) -> Result<Cli, Fault> {
    let mut command = Cli::command();
    let mut file = None;
    if let Some(path) = named(words) {
        let read = File::read(&path).map_err(Fault::File)?;
        command = read.apply(command).map_err(Fault::File)?;
        file = Some(read);
    }
    let usage = |error| Fault::Usage(with_origin(error, file.as_ref()));
    let matches = command.clone().try_get_matches_from(words).map_err(usage)?;
    Cli::from_arg_matches(&matches).map_err(|error| usage(error.format(&mut command)))
}

/// The file of `--config` or its variable. What else is wrong is told by the parse that follows.
fn named(words: &[OsString]) -> Option<PathBuf> {
    let matches = Cli::command().ignore_errors(true).try_get_matches_from(words).ok()?;
    matches.get_one::<PathBuf>("config").cloned()
}

struct File {
    path: PathBuf,
    table: Table,
}

impl File {
    fn read(path: &Path) -> Result<Self> {
        let shown = path.display();
        let unreadable = || format!("cannot read --config {shown}");
        let length = fs::metadata(path).with_context(unreadable)?.len();
        if length > FILE_BYTES_MAX {
            bail!("--config {shown} has {length} bytes; at most {FILE_BYTES_MAX} are read");
        }
        let text = fs::read_to_string(path).with_context(unreadable)?;
        match text.parse() {
            Ok(table) => Ok(Self { path: path.to_owned(), table }),
            Err(error) => {
                let start = error.span().map_or(0, |span| span.start);
                let line = text.bytes().take(start).filter(|&byte| byte == b'\n').count() + 1;
                let reason = error.message();
                bail!("--config {shown}, line {line}: {reason}; the file must be TOML")
            }
        }
    }

    /// The command with the file's values as its defaults.
    fn apply(&self, mut command: Command) -> Result<Command> {
        let place = |what: String| format!("--config {}: {what}", self.path.display());
        for (key, value) in &self.table {
            let Value::Table(section) = value else {
                let (id, values) =
                    default(&command, key, value).with_context(|| place(key.into()))?;
                command = command.mut_arg(id, |arg| arg.default_values(values));
                continue;
            };
            let Some(sub) = command.find_subcommand(key).filter(|sub| !sub.is_hide_set()) else {
                let known = command.get_subcommands().filter(|sub| !sub.is_hide_set());
                let near = nearest(key, known.map(Command::get_name));
                bail!(place(format!("no command [{key}]{near}; `lockstep --help` lists them")));
            };
            let mut defaults = Vec::new();
            for (name, value) in section {
                let place = || place(format!("[{key}] {name}"));
                defaults.push(default(sub, name, value).with_context(place)?);
            }
            command = command.mut_subcommand(key, |sub| {
                defaults.into_iter().fold(sub, |sub, (id, values)| {
                    sub.mut_arg(id, |arg| arg.default_values(values))
                })
            });
        }
        Ok(command)
    }

    /// Whether it gives a flag this value.
    fn says(&self, flag: &str, value: &str) -> bool {
        let within = |table: &Table| {
            let given = table.get(flag).and_then(|given| texts(given).ok());
            given.is_some_and(|texts| texts.iter().any(|text| text == value))
        };
        within(&self.table) || self.table.values().filter_map(Value::as_table).any(within)
    }
}

/// The id of the flag that a key stands for, and its values as the command line would have them.
fn default(command: &Command, key: &str, value: &Value) -> Result<(String, Vec<String>)> {
    let flags: Vec<&Arg> = settable(command).collect();
    let Some(flag) = flags.iter().find(|flag| flag.get_long() == Some(key)) else {
        if command.get_arguments().any(|arg| arg.get_long() == Some(key)) {
            bail!("--{key} is given on the command line only");
        }
        let near = nearest(key, flags.iter().filter_map(|flag| flag.get_long()));
        let name = command.get_name();
        let help = if name == "lockstep" { String::new() } else { format!("{name} ") };
        bail!("no such key{near}; `lockstep {help}--help` lists the flags");
    };
    let many =
        matches!(flag.get_action(), ArgAction::Append) || flag.get_value_delimiter().is_some();
    if value.is_array() && !many {
        bail!("takes one value, not a list");
    }
    Ok((flag.get_id().to_string(), texts(value)?))
}

/// Flags that a file may set: not those that every call must say itself.
pub fn settable(command: &Command) -> impl Iterator<Item = &Arg> {
    let required = |arg: &Arg| {
        let mut groups = command.get_groups().filter(|group| group.is_required_set());
        arg.is_required_set() || groups.any(|group| group.get_args().any(|id| id == arg.get_id()))
    };
    command.get_arguments().filter(move |arg| {
        let own = !["help", "version", "config"].contains(&arg.get_id().as_str());
        own && arg.get_long().is_some() && !required(arg)
    })
}

fn texts(value: &Value) -> Result<Vec<String>> {
    match value {
        Value::Array(values) if values.iter().all(|value| !value.is_array()) => {
            let texts = values.iter().map(texts).collect::<Result<Vec<_>>>()?;
            Ok(texts.concat())
        }
        Value::String(text) => Ok(vec![text.clone()]),
        Value::Integer(number) => Ok(vec![number.to_string()]),
        Value::Float(number) => Ok(vec![number.to_string()]),
        Value::Boolean(flag) => Ok(vec![flag.to_string()]),
        _ => bail!("must be a string, a number, true, false, or a list of these"),
    }
}

/// A question about the known word that differs least, if it differs little.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    let near = known.map(|known| (distance(known, word), known)).min();
    match near {
        Some((distance, near)) if distance <= 1 + word.len() / 4 => {
            format!(" (did you mean {near}?)")
        }
        _ => String::new(),
    }
}

/// Says that a value which clap refused stands in the file.
fn with_origin(mut error: clap::Error, file: Option<&File>) -> clap::Error {
    let (Some(file), Some(ContextValue::String(flag)), Some(ContextValue::String(value))) =
        (file, error.get(ContextKind::InvalidArg), error.get(ContextKind::InvalidValue))
    else {
        return error;
    };
    let name = flag.split(' ').next().unwrap_or_default().trim_start_matches('-');
    if file.says(name, value) {
        let told = format!("the value stands in --config {}", file.path.display());
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![told.into()]));
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Command as Sub;

    fn parsed(text: &str, line: &str) -> Result<Cli, Fault> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let path = file.path().display().to_string();
        let words = ["lockstep", "--config", &path].into_iter().chain(line.split_whitespace());
        parse(&words.map(OsString::from).collect::<Vec<_>>())
    }

    /// What is told, on the terminal.
    fn refused(text: &str, line: &str) -> String {
        match parsed(text, line) {
            Ok(_) => panic!("{text:?} was taken"),
            Err(Fault::File(error)) => format!("{error:#}"),
            Err(Fault::Usage(error)) => error.to_string(),
        }
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_the_defaults() {
        let text = "log-format = \"json\"\n\
                    [up]\ntp = 3\nkv-memory = \"1G\"\nalias = [\"a=m\", \"b=m\"]\n\
                    [router]\netcd = [\"http://a:1\", \"http://b:2\"]\n\
                    [run]\nignore-eos = true\nstop = [\"x,y\"]\ntemperature = 0.5\n";
        let up = |line: &str| match parsed(text, line).unwrap().command {
            Sub::Up(args) => format!("{args:?}"),
            _ => panic!("{line} is up"),
        };
        let (file, flags) = (up("up"), up("up --tp 2 --alias c=m"));
        for part in ["tp: 3", "kv_memory: Some(1073741824)", "(\"b\", \"m\")", "queue: 256"] {
            assert!(file.contains(part), "{part} in {file}");
        }
        assert!(flags.contains("tp: 2") && flags.contains("[(\"c\", \"m\")]"), "{flags}");
        let cli = parsed(text, "run --prompt x").unwrap();
        assert!(format!("{:?}", cli.log).contains("Json"));
        let Sub::Run(args) = cli.command else { panic!("run is run") };
        let shown = format!("{args:?}");
        for part in ["ignore_eos: true", "stop: [\"x,y\"]", "temperature: Some(0.5)"] {
            assert!(shown.contains(part), "{part} in {shown}");
        }
    }

    #[test]
    fn what_is_unknown_is_named_with_the_nearest_that_is_known() {
        for (text, parts) in [
            ("[up]\ntpp = 2", ["[up] tpp", "did you mean tp?"]),
            ("[up]\nkv_memory = 1", ["[up] kv_memory", "did you mean kv-memory?"]),
            ("[upp]\ntp = 2", ["[upp]", "did you mean up?"]),
            ("[rank]\nrank = 0", ["no command [rank]", "--help"]),
            ("log-fromat = \"json\"", ["log-fromat", "did you mean log-format?"]),
            ("[router]\nsomething-else = 1", ["[router] something-else", "router --help"]),
            ("[run]\nprompt = \"x\"", ["[run] prompt", "command line only"]),
            ("config = \"x\"", ["config", "command line only"]),
            ("[up]\ntp = [1, 2]", ["[up] tp", "one value"]),
            ("[up]\ntp = 2020-01-01", ["[up] tp", "must be"]),
            ("[up]\nalias = { a = \"m\" }", ["[up] alias", "must be"]),
            ("[up]\n\ntp = = 2", ["line 3", "TOML"]),
        ] {
            let told = refused(text, "up");
            assert!(parts.iter().all(|part| told.contains(part)), "{text:?}: {told}");
        }
    }

    #[test]
    fn a_wrong_value_is_refused_with_its_place() {
        for (text, parts) in [
            ("[up]\ntp = \"two\"", ["--tp", "two", "stands in --config"]),
            ("[up]\nalias = [\"a\"]", ["--alias", "NAME=MODEL", "stands in --config"]),
            ("[up]\nhttp = \"here\"", ["--http", "here", "stands in --config"]),
        ] {
            let told = refused(text, "up");
            assert!(parts.iter().all(|part| told.contains(part)), "{text:?}: {told}");
        }
        let told = refused("[up]\ntp = 2", "up --tp two");
        assert!(!told.contains("stands in"), "{told}");
    }

    #[test]
    fn a_file_that_is_not_there_is_refused_and_help_needs_none() {
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        match parse(&words("lockstep --config /nowhere.toml up")) {
            Err(Fault::File(error)) => assert!(format!("{error:#}").contains("/nowhere.toml")),
            _ => panic!("no file, no start"),
        }
        let help = parse(&words("lockstep up --config /nowhere.toml --help"));
        assert!(matches!(help, Err(Fault::Usage(error)) if !error.use_stderr()));
    }
}
