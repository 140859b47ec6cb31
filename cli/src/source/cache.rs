//! The cache folder and what is whole in it.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow};
use cluster::telemetry;
use directories::ProjectDirs;
use serde::{Deserialize, Serialize};

/// The environment variable that moves the cache.
pub const VARIABLE: &str = "LOCKSTEP_CACHE";

pub struct Cache {
    folder: PathBuf,
}

/// Written once every file of a model is there and checked.
#[derive(Serialize, Deserialize)]
struct Record {
    path: PathBuf,
    files: Vec<(PathBuf, u64)>,
}

impl Cache {
    /// `LOCKSTEP_CACHE`, or the platform's folder for caches.
    pub fn open() -> Result<Self> {
        let folder = match env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
            Some(folder) => PathBuf::from(folder),
            None => ProjectDirs::from("", "", "lockstep")
                .ok_or_else(|| anyhow!("no home folder: set {VARIABLE} to a folder for models"))?
                .cache_dir()
                .to_owned(),
        };
        Self::at(folder)
    }

    /// A cache in a folder of the caller's choice.
    pub fn at(folder: PathBuf) -> Result<Self> {
        let remedy = || format!("cannot use the cache {}; set {VARIABLE}", folder.display());
        fs::create_dir_all(&folder).with_context(remedy)?;
        let folder = folder.canonicalize().with_context(remedy)?;
        Ok(Self { folder })
    }

    /// A folder inside the cache, made if absent.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(folder)
    }

    fn record_path(&self, key: &str) -> PathBuf {
        self.folder.join("records").join(format!("{}.json", key.replace('/', "--")))
    }

    /// Where the model is, if every file of it still is as it was recorded.
    pub fn find(&self, key: &str) -> Option<PathBuf> {
        let record = fs::read(self.record_path(key)).ok()?;
        let record: Record = serde_json::from_slice(&record).ok()?;
        let whole = |(path, size): &(PathBuf, u64)| {
            fs::metadata(path).is_ok_and(|found| found.len() == *size)
        };
        record.files.iter().all(whole).then_some(record.path)
    }

    /// Remembers that the model is whole.
    pub fn record(&self, key: &str, path: &Path, files: &[PathBuf]) -> Result<()> {
        let sized = |file: &PathBuf| Ok((file.clone(), fs::metadata(file)?.len()));
        let files = files.iter().map(sized).collect::<Result<_>>()?;
        let record = serde_json::to_vec(&Record { path: path.to_owned(), files })?;
        let at = self.record_path(key);
        self.folder("records")?;
        // Renamed into place, so that nobody reads half of it.
        let half = at.with_extension("part");
        fs::write(&half, record).and_then(|()| fs::rename(&half, &at))?;
        Ok(())
    }

    /// Held while a model is fetched: a second process waits instead of fetching it again.
    pub fn lock(&self, key: &str) -> Result<fs::File> {
        let path = self.folder("locks")?.join(key.replace('/', "--"));
        let file = fs::File::create(&path)?;
        if file.try_lock().is_err() {
            telemetry::say(format_args!("waiting for another process that fetches {key}"));
            file.lock()?;
        }
        Ok(file)
    }
}
