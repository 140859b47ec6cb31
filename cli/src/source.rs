//! Where models come from: a name becomes a file or folder on this machine.
//!
//! A model that is here already is used as it is, without asking any network. What a hub sends is
//! believed only if size and checksum agree with what the hub announced; half a file is kept and
//! continued, a wrong one is thrown away.

mod cache;
mod causes;
mod checksum;
mod demo;
mod files;
mod hugging_face;
mod model_scope;
mod names;

use std::path::{Path, PathBuf};

use anyhow::{Error, Result, anyhow, bail};

pub use cache::Cache;
pub use names::{distance, listing};

/// A model's origin, read from what the user typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Local(PathBuf),
    Demo,
    HuggingFace(Repository),
    ModelScope(Repository),
}

/// `org/name`, and one file of it where a file is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    pub id: String,
    pub file: Option<String>,
}

impl Source {
    /// Reads `demo`, a short name, `org/name[:file]` (Hugging Face, also as `hf:…`),
    /// `modelscope:org/name[:file]`, or the path of something that exists.
    ///
    /// # Errors
    /// Nothing of these.
    pub fn parse(name: &str) -> Result<Self> {
        let path = Path::new(name);
        if path.exists() {
            return Ok(Self::Local(path.to_owned()));
        }
        if name.starts_with(['/', '.', '~']) {
            bail!("no model at {name}: the path does not exist");
        }
        if name == demo::NAME {
            return Ok(Self::Demo);
        }
        if let Some(rest) = name.strip_prefix("modelscope:") {
            return Ok(Self::ModelScope(Repository::parse(rest)?));
        }
        if let Some(rest) = name.strip_prefix("hf:") {
            return Ok(Self::HuggingFace(Repository::parse(rest)?));
        }
        if let Some(id) = names::repository(name) {
            return Ok(Self::HuggingFace(Repository { id, file: None }));
        }
        if name.contains('/') {
            return Ok(Self::HuggingFace(Repository::parse(name)?));
        }
        bail!(
            "unknown model {name:?}{}; give a path, org/name[:file], or a name that \
             `lockstep pull --list` shows",
            names::nearest(name).map(|near| format!(" (did you mean {near}?)")).unwrap_or_default()
        )
    }

    /// What the cache calls it.
    fn key(&self) -> String {
        let repository = |hub: &str, repository: &Repository| match &repository.file {
            Some(file) => format!("{hub}/{}/{file}", repository.id),
            None => format!("{hub}/{}", repository.id),
        };
        match self {
            Self::Local(path) => path.display().to_string(),
            Self::Demo => demo::NAME.to_owned(),
            Self::HuggingFace(of) => repository("huggingface", of),
            Self::ModelScope(of) => repository("modelscope", of),
        }
    }
}

impl Repository {
    fn parse(text: &str) -> Result<Self> {
        let (id, file) = match text.split_once(':') {
            Some((id, file)) => (id, Some(file.to_owned())),
            None => (text, None),
        };
        let word = |part: &str| {
            let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            !part.is_empty() && part.chars().all(fine) && !part.starts_with('.')
        };
        let parts: Vec<_> = id.split('/').collect();
        let sound = parts.len() == 2 && parts.iter().all(|part| word(part));
        if !sound || file.as_deref().is_some_and(|file| !files::is_plain_name(file)) {
            bail!("{text:?} names no repository; write org/name or org/name:file");
        }
        Ok(Self { id: id.to_owned(), file })
    }
}

/// The file or folder of the model `name`, fetched if it is not here yet.
///
/// # Errors
/// An unknown name, a hub that cannot be reached or answers wrongly, a full disk.
pub fn resolve(name: &str) -> Result<PathBuf> {
    let source = Source::parse(name)?;
    if let Source::Local(path) = source {
        return Ok(path);
    }
    fetch(&source, &Cache::open()?)
}

/// The file or folder of the model `name` if it is here; asks no network.
///
/// # Errors
/// An unknown name, or one that was not fetched yet.
pub fn present(name: &str) -> Result<PathBuf> {
    let source = Source::parse(name)?;
    if let Source::Local(path) = source {
        return Ok(path);
    }
    Cache::open()?.find(&source.key()).ok_or_else(|| {
        anyhow!(
            "{name} is not on this machine; `lockstep pull {name}` fetches it, and a folder with \
             its config.json alone is enough to plan"
        )
    })
}

/// `resolve` against a given cache and the hubs' usual addresses, or those in the environment.
fn fetch(source: &Source, cache: &Cache) -> Result<PathBuf> {
    let key = source.key();
    if let Some(path) = cache.find(&key) {
        return Ok(path);
    }
    let _lock = cache.lock(&key)?;
    // Another process may have fetched it meanwhile.
    if let Some(path) = cache.find(&key) {
        return Ok(path);
    }
    let (path, files) = match source {
        Source::Local(path) => return Ok(path.clone()),
        Source::Demo => demo::fetch(cache),
        Source::HuggingFace(repository) => {
            hugging_face::fetch(repository, cache, &hugging_face::endpoint())
        }
        Source::ModelScope(repository) => {
            model_scope::fetch(repository, cache, &model_scope::endpoint())
        }
    }
    .map_err(|error| explained(&key, error))?;
    cache.record(&key, &path, &files).map_err(|error| explained(&key, error))?;
    Ok(path)
}

/// Where the machine itself is the cause, that is said, and not what came of it on the way.
fn explained(key: &str, error: Error) -> Error {
    match causes::of(&format!("{error:#}")) {
        Some(cause) => anyhow!("cannot fetch {key}: {cause}"),
        None => error.context(format!("cannot fetch {key}")),
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod name_tests {
    use super::*;

    fn hub(id: &str, file: Option<&str>) -> Repository {
        Repository { id: id.to_owned(), file: file.map(str::to_owned) }
    }

    #[test]
    fn names_are_read_as_the_sources_they_name() {
        let parse = |name: &str| Source::parse(name).unwrap();
        assert_eq!(parse("demo"), Source::Demo);
        assert_eq!(parse("Qwen/Qwen3-8B"), Source::HuggingFace(hub("Qwen/Qwen3-8B", None)));
        assert_eq!(
            parse("hf:Qwen/Qwen3-8B-GGUF:Qwen3-8B-Q4_K_M.gguf"),
            Source::HuggingFace(hub("Qwen/Qwen3-8B-GGUF", Some("Qwen3-8B-Q4_K_M.gguf")))
        );
        assert_eq!(parse("modelscope:qwen/Qwen-7B"), Source::ModelScope(hub("qwen/Qwen-7B", None)));
        assert_eq!(
            parse("qwen2.5-0.5b"),
            Source::HuggingFace(hub("Qwen/Qwen2.5-0.5B-Instruct", None))
        );
        assert_eq!(parse("."), Source::Local(".".into()));
    }

    #[test]
    fn what_names_nothing_is_refused_with_a_hint() {
        for (name, word) in [
            ("qwen3-9b", "did you mean qwen3-4b?"),
            ("./absent", "does not exist"),
            ("Qwen/Qwen3-8B:../../etc/passwd", "names no repository"),
            ("a/b/c", "names no repository"),
            ("../x/y", "does not exist"),
            ("hf:..%2f/x", "names no repository"),
        ] {
            let error = Source::parse(name).unwrap_err().to_string();
            assert!(error.contains(word), "{name}: {error}");
        }
    }
}
