//! Models from Hugging Face, through `hf-hub`: its cache layout, its way of continuing.

use std::{
    env,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{RecvTimeoutError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};

use super::{Cache, Repository, checksum, files};
use crate::progress::{ProgressReport, Unit};

/// `hf-hub` sets no deadlines of its own: without a byte for this long a download is given up.
const STALL: Duration = Duration::from_secs(60);

/// The hub's address; `HF_ENDPOINT` names a mirror.
pub fn endpoint() -> String {
    env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".to_owned())
}

/// Fetches what makes a model of the repository.
pub fn fetch(
    repository: &Repository,
    cache: &Cache,
    endpoint: &str,
) -> Result<(PathBuf, Vec<PathBuf>)> {
    let folder = cache.folder("huggingface")?;
    let mut builder = ApiBuilder::new()
        .with_endpoint(endpoint.trim_end_matches('/').to_owned())
        .with_cache_dir(folder.clone())
        .with_progress(false);
    if let Some(token) = env::var("HF_TOKEN").ok().filter(|token| !token.is_empty()) {
        builder = builder.with_token(Some(token));
    }
    let api = builder.build()?;
    let id = repository.id.clone();
    let (asked, from) = (api.clone(), id.clone());
    let idle = Arc::new(AtomicU64::new(0));
    let listed = unless_stalled(&idle, move |_| asked.model(from).info())?;
    let listed = listed.map_err(|error| explain(error, &id, endpoint))?;
    let names: Vec<_> = listed.siblings.into_iter().map(|file| file.rfilename).collect();
    let chosen = files::choose(&names, repository.file.as_deref())?;
    let mut paths = Vec::with_capacity(chosen.len());
    for name in &chosen {
        // What an interrupted fetch completed need not come again.
        let path = match hf_hub::Cache::new(folder.clone()).model(id.clone()).get(name) {
            Some(path) => path,
            None => fetch_file(&api, &id, name, endpoint)?,
        };
        paths.push(path);
    }
    let first = paths.first().context("the repository holds no files")?;
    let model = match repository.file {
        Some(_) => first.clone(),
        None => first.parent().context("a cached file has no folder")?.to_owned(),
    };
    Ok((model, paths))
}

fn fetch_file(api: &Api, id: &str, name: &str, endpoint: &str) -> Result<PathBuf> {
    let (api, repo_id, file) = (api.clone(), id.to_owned(), name.to_owned());
    let idle = Arc::new(AtomicU64::new(0));
    let fetched = unless_stalled(&idle, move |idle| {
        let repo = api.model(repo_id);
        let announced = api.metadata(&repo.url(&file))?;
        Ok::<_, ApiError>((download(&repo, &file, idle)?, announced))
    })?;
    let (path, announced) = fetched.map_err(|error| explain(error, id, endpoint))?;
    // Large files carry their SHA-256 as entity tag.
    let tag = announced.etag();
    let sum = (tag.len() == 64 && tag.bytes().all(|b| b.is_ascii_hexdigit())).then_some(tag);
    let stored = path.canonicalize()?;
    let checked = checksum::verify(&stored, announced.size() as u64, sum);
    if checked.is_err() {
        std::fs::remove_file(&path)?;
    }
    checked.map(|()| path)
}

fn download(repo: &ApiRepo, file: &str, idle: Arc<AtomicU64>) -> Result<PathBuf, ApiError> {
    repo.download_with_progress(file, Watched { idle, bar: None })
}

/// Shows progress and resets the count of idle seconds with every byte.
struct Watched {
    idle: Arc<AtomicU64>,
    bar: Option<ProgressReport>,
}

impl hf_hub::api::Progress for Watched {
    fn init(&mut self, size: usize, filename: &str) {
        self.bar = Some(ProgressReport::new(filename, Unit::Bytes, size as u64));
    }

    fn update(&mut self, size: usize) {
        self.idle.store(0, Ordering::Relaxed);
        if let Some(bar) = &mut self.bar {
            bar.add(size as u64);
        }
    }

    fn finish(&mut self) {
        self.bar = None;
    }
}

/// Runs `work` on a thread of its own and gives up once nothing has moved for `STALL`. The thread
/// then ends with the process, which has nothing else to do.
fn unless_stalled<T: Send + 'static>(
    idle: &Arc<AtomicU64>,
    work: impl FnOnce(Arc<AtomicU64>) -> T + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = sync_channel(1);
    let counter = idle.clone();
    thread::spawn(move || {
        // The receiver is gone only after a stall, when nobody wants the result.
        let _given_up = sender.send(work(counter));
    });
    let began = Instant::now();
    loop {
        match receiver.recv_timeout(Duration::from_secs(1)) {
            Ok(done) => return Ok(done),
            Err(RecvTimeoutError::Disconnected) => bail!("the download ended unexpectedly"),
            Err(RecvTimeoutError::Timeout) => {
                if idle.fetch_add(1, Ordering::Relaxed) >= STALL.as_secs() {
                    let seconds = began.elapsed().as_secs();
                    bail!(
                        "nothing came for {} s (after {seconds} s); run it again to continue",
                        STALL.as_secs()
                    );
                }
            }
        }
    }
}

fn explain(error: ApiError, id: &str, endpoint: &str) -> anyhow::Error {
    let status = match &error {
        ApiError::RequestError(error) => match error.as_ref() {
            ureq::Error::StatusCode(code) => Some(*code),
            _ => None,
        },
        _ => None,
    };
    match status {
        Some(404) => anyhow!("{endpoint} has no {id}, or not this file of it"),
        Some(401 | 403) => anyhow!("{endpoint} wants permission for {id}; set HF_TOKEN"),
        Some(416) => {
            anyhow!("{endpoint} cannot continue {id}; delete its .part files in the cache")
        }
        Some(code) => anyhow!("{endpoint} answered {code}"),
        None => anyhow!("{endpoint}: {error}; is it reachable? HF_ENDPOINT names a mirror"),
    }
}
