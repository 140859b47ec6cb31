//! Fetching from a small hub of our own on loopback, which can be made to misbehave.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use sha2::{Digest, Sha256};

use super::*;

const ID: &str = "org/model";

/// Speaks as much of both hubs' interfaces as a client needs.
struct Hub {
    address: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Sends so many bytes of the next large answer, then hangs up.
    cut_next: Option<usize>,
    /// Sends other bytes than announced, of the same number.
    corrupt: bool,
    /// File and first byte of every transfer asked for.
    asked: Vec<(String, usize)>,
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Hub {
    fn start(files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let files = files.iter().map(|(name, data)| ((*name).to_owned(), data.to_vec())).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let shared = state.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = shared.clone();
                // A client that hangs up ends the exchange, and that is all.
                thread::spawn(move || answer(stream, &shared).ok());
            }
        });
        Self { address, state }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    fn asked(&self) -> Vec<(String, usize)> {
        std::mem::take(&mut self.state.lock().unwrap().asked)
    }
}

fn answer(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut request, mut range) = (String::new(), None);
    reader.read_line(&mut request)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(wanted) = line.strip_prefix("range: bytes=") {
            let (start, end) = wanted.split_once('-').unwrap();
            range = Some((start.parse::<usize>().unwrap(), end.parse::<usize>().ok()));
        }
    }
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut state = state.lock().unwrap();
    if let Some(list) = listing(&path, &state) {
        return send(stream, "200 OK", "", list.as_bytes(), list.len());
    }
    let name = path
        .strip_prefix(&format!("/{ID}/resolve/main/"))
        .or_else(|| path.split("FilePath=").nth(1))
        .unwrap_or_default();
    let Some(data) = state.files.get(name).cloned() else {
        return send(stream, "404 Not Found", "", b"{}", 2);
    };
    let (start, end) = range.unwrap_or((0, None));
    let end = end.map_or(data.len(), |last| (last + 1).min(data.len()));
    let headers = format!(
        "ETag: \"{}\"\r\nx-repo-commit: c0ffee\r\nContent-Range: bytes {start}-{}/{}\r\n",
        sum(&data),
        end.saturating_sub(1),
        data.len()
    );
    let mut body = data[start..end].to_vec();
    // One byte is how a client asks for the size.
    if body.len() > 1 {
        state.asked.push((name.to_owned(), start));
        if state.corrupt {
            body.fill(b'!');
        }
    }
    let length = body.len();
    if length > 1
        && let Some(cut) = state.cut_next.take()
    {
        body.truncate(cut);
    }
    drop(state);
    send(stream, "206 Partial Content", &headers, &body, length)
}

/// The list of files, in the words of either hub.
fn listing(path: &str, state: &State) -> Option<String> {
    if path.starts_with(&format!("/api/models/{ID}/revision/")) {
        let files: Vec<_> =
            state.files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        return Some(serde_json::json!({ "siblings": files, "sha": "c0ffee" }).to_string());
    }
    if path.starts_with(&format!("/api/v1/models/{ID}/repo/files?")) {
        let entry = |(name, data): (&String, &Vec<u8>)| {
            serde_json::json!({
                "Name": name, "Path": name, "Type": "blob", "Size": data.len(),
                "Sha256": sum(data),
            })
        };
        let files: Vec<_> = state.files.iter().map(entry).collect();
        return Some(serde_json::json!({ "Code": 200, "Data": { "Files": files } }).to_string());
    }
    None
}

fn send(
    mut to: TcpStream,
    status: &str,
    headers: &str,
    body: &[u8],
    length: usize,
) -> std::io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    to.write_all(head.as_bytes())?;
    to.write_all(body)
}

type Fetch = fn(&Repository, &Cache, &str) -> Result<(PathBuf, Vec<PathBuf>)>;
const HUBS: [(&str, Fetch); 2] =
    [("hugging face", hugging_face::fetch), ("modelscope", model_scope::fetch)];

fn weights() -> Vec<u8> {
    (0..200_000u32).flat_map(u32::to_le_bytes).collect()
}

fn repository(file: Option<&str>) -> Repository {
    Repository { id: ID.to_owned(), file: file.map(str::to_owned) }
}

fn cache() -> (tempfile::TempDir, Cache) {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path().to_owned()).unwrap();
    (folder, cache)
}

#[test]
fn a_model_comes_whole_and_only_once() {
    for (hub_name, fetch) in HUBS {
        let (weights, (_folder, cache)) = (weights(), cache());
        let hub = Hub::start(&[
            ("config.json", b"{\"a\": 1}"),
            ("model.safetensors", &weights),
            ("README.md", b"# no part of it"),
        ]);
        let (model, files) = fetch(&repository(None), &cache, &hub.address).unwrap();
        assert_eq!(std::fs::read(model.join("model.safetensors")).unwrap(), weights, "{hub_name}");
        assert_eq!(std::fs::read(model.join("config.json")).unwrap(), b"{\"a\": 1}");
        assert!(!model.join("README.md").exists() && files.len() == 2, "{hub_name}");
        assert_eq!(hub.asked().len(), 2);
        // What is here is not asked for again; once recorded the hub is not even asked.
        fetch(&repository(None), &cache, &hub.address).unwrap();
        assert_eq!(hub.asked(), [], "{hub_name}");
        cache.record("key", &model, &files).unwrap();
        assert_eq!(cache.find("key"), Some(model.clone()));
        std::fs::remove_file(&files[0]).unwrap();
        assert_eq!(cache.find("key"), None);
    }
}

#[test]
fn an_interrupted_download_is_continued() {
    for (hub_name, fetch) in HUBS {
        let (weights, (_folder, cache)) = (weights(), cache());
        let hub = Hub::start(&[("model.gguf", &weights)]);
        hub.set(|state| state.cut_next = Some(300_000));
        let only = repository(Some("model.gguf"));
        let error = format!("{:#}", fetch(&only, &cache, &hub.address).unwrap_err());
        assert!(!error.is_empty(), "{hub_name}");
        let (model, _) = fetch(&only, &cache, &hub.address).unwrap();
        assert_eq!(std::fs::read(model).unwrap(), weights, "{hub_name}");
        let asked: Vec<_> = hub.asked().into_iter().map(|(_, start)| start).collect();
        assert_eq!(asked[0], 0, "{hub_name}");
        assert!(asked[1] > 0 && asked[1] <= 300_000, "{hub_name}: {asked:?}");
    }
}

#[test]
fn what_differs_from_its_announced_checksum_is_thrown_away() {
    for (hub_name, fetch) in HUBS {
        let (weights, (_folder, cache)) = (weights(), cache());
        let hub = Hub::start(&[("model.gguf", &weights)]);
        let only = repository(Some("model.gguf"));
        hub.set(|state| state.corrupt = true);
        let error = format!("{:#}", fetch(&only, &cache, &hub.address).unwrap_err());
        assert!(error.contains("SHA-256"), "{hub_name}: {error}");
        hub.set(|state| state.corrupt = false);
        let (model, _) = fetch(&only, &cache, &hub.address).unwrap();
        assert_eq!(std::fs::read(model).unwrap(), weights, "{hub_name}");
    }
}

#[test]
fn absent_repositories_files_and_hubs_are_told_apart() {
    for (hub_name, fetch) in HUBS {
        let (_folder, cache) = cache();
        let hub = Hub::start(&[("a.gguf", b"a"), ("b.gguf", b"b")]);
        let failure = |repository: &Repository, address: &str| {
            format!("{:#}", fetch(repository, &cache, address).unwrap_err())
        };
        let absent = Repository { id: "org/absent".to_owned(), file: None };
        let error = failure(&absent, &hub.address);
        assert!(error.contains("has no org/absent"), "{hub_name}: {error}");
        let error = failure(&repository(Some("c.gguf")), &hub.address);
        assert!(error.contains("a.gguf, b.gguf"), "{hub_name}: {error}");
        let error = failure(&repository(None), &hub.address);
        assert!(error.contains("org/name:FILE"), "{hub_name}: {error}");
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = failure(&repository(None), &format!("http://{nobody}"));
        assert!(error.contains("reachable"), "{hub_name}: {error}");
    }
}
