//! Models from ModelScope, over its public file interface.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use ureq::Agent;

use super::{Cache, Repository, checksum, files};
use crate::progress::{ProgressReport, Unit};

const LIST_BYTES_MAX: u64 = 16 << 20;

/// The hub's address; `MODELSCOPE_ENDPOINT` names a mirror.
pub fn endpoint() -> String {
    env::var("MODELSCOPE_ENDPOINT").unwrap_or_else(|_| "https://modelscope.cn".to_owned())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listing {
    data: Option<ListingData>,
    message: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListingData {
    files: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    path: String,
    #[serde(rename = "Type")]
    kind: String,
    size: u64,
    #[serde(default)]
    sha256: Option<String>,
}

/// Fetches what makes a model of the repository.
pub fn fetch(
    repository: &Repository,
    cache: &Cache,
    endpoint: &str,
) -> Result<(PathBuf, Vec<PathBuf>)> {
    let agent: Agent = Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(20)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .timeout_per_read(Some(Duration::from_secs(60)))
        .build()
        .into();
    let base = format!("{}/api/v1/models/{}", endpoint.trim_end_matches('/'), repository.id);
    let entries = list(&agent, &base, endpoint, &repository.id)?;
    let names: Vec<_> = entries.iter().map(|entry| entry.path.clone()).collect();
    let chosen = files::choose(&names, repository.file.as_deref())?;
    let folder = cache.folder(&format!("modelscope/{}", repository.id))?;
    let mut paths = Vec::with_capacity(chosen.len());
    for entry in entries.iter().filter(|entry| chosen.contains(&entry.path)) {
        let path = folder.join(&entry.path);
        let whole = |path: &Path| {
            path.exists() && checksum::verify(path, entry.size, entry.sha256.as_deref()).is_ok()
        };
        if !whole(&path) {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            download(&agent, &base, entry, &path)?;
        }
        paths.push(path);
    }
    let model = match (&repository.file, paths.first()) {
        (Some(_), Some(file)) => file.clone(),
        _ => folder,
    };
    Ok((model, paths))
}

fn list(agent: &Agent, base: &str, endpoint: &str, id: &str) -> Result<Vec<Entry>> {
    let url = format!("{base}/repo/files?Revision=master&Recursive=true");
    let mut answer = agent.get(&url).call().map_err(|error| match error {
        ureq::Error::StatusCode(404) => anyhow!("{endpoint} has no {id}"),
        ureq::Error::StatusCode(code) => anyhow!("{endpoint} answered {code}"),
        error => anyhow!("{endpoint}: {error}; is it reachable?"),
    })?;
    let listing: Listing = answer
        .body_mut()
        .with_config()
        .limit(LIST_BYTES_MAX)
        .read_json()
        .with_context(|| format!("{endpoint} sent no list of files"))?;
    let Some(data) = listing.data else {
        bail!("{endpoint}: {}", listing.message.unwrap_or_else(|| "no list of files".into()));
    };
    Ok(data.files.into_iter().filter(|entry| entry.kind == "blob").collect())
}

/// Continues `PATH.part` where an earlier attempt left it, then checks the whole.
fn download(agent: &Agent, base: &str, entry: &Entry, path: &Path) -> Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let have = fs::metadata(&part).map_or(0, |found| found.len());
    let have = if have > entry.size { 0 } else { have };
    if have < entry.size || entry.size == 0 {
        let url = format!("{base}/repo");
        let request = agent
            .get(&url)
            .query("Revision", "master")
            .query("FilePath", &entry.path)
            .header("Range", format!("bytes={have}-"));
        let answer = request.call().with_context(|| format!("cannot fetch {}", entry.path))?;
        // A server that does not continue sends all of it again.
        let start = if answer.status().as_u16() == 206 { have } else { 0 };
        let mut file = OpenOptions::new().create(true).append(true).open(&part)?;
        file.set_len(start)?;
        let mut progress = ProgressReport::new(&entry.path, Unit::Bytes, entry.size);
        progress.set(start);
        let left = entry.size - start;
        copy(answer.into_body().into_reader(), &mut file, left, &mut progress)
            .with_context(|| format!("{}: interrupted; run it again to continue", entry.path))?;
    }
    checksum::verify(&part, entry.size, entry.sha256.as_deref())?;
    fs::rename(&part, path)?;
    Ok(())
}

/// Exactly `left` bytes, or an error with what came kept.
fn copy(
    mut from: impl Read,
    to: &mut File,
    left: u64,
    progress: &mut ProgressReport,
) -> io::Result<()> {
    let (mut left, mut buffer) = (left, vec![0; 1 << 18]);
    while left > 0 {
        let room = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let read = from.read(&mut buffer[..room])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        to.write_all(&buffer[..read])?;
        left -= read as u64;
        progress.add(read as u64);
    }
    Ok(())
}
