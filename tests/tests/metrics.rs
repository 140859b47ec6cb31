//! `/metrics` of router and worker: what Prometheus' own linter says, and that `docs/metrics.md`
//! lists what is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::json;
use tests::{Process, exchange};

const MODEL: &str = "qwen2_gqa4_tied_sharded";

/// A metric's type and the names of its labels.
type Kind = (String, BTreeSet<String>);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent")
}

/// What an exposition declares, with the labels of its samples.
fn declared(text: &str) -> BTreeMap<String, Kind> {
    let mut all: BTreeMap<String, Kind> = BTreeMap::new();
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' ')) {
            let twice = all.insert(name.to_owned(), (kind.to_owned(), BTreeSet::new()));
            assert!(twice.is_none(), "{name} is declared twice");
        }
        if line.starts_with('#') {
            continue;
        }
        let (name, labels) = match line.split_once('{') {
            Some((name, rest)) => (name, rest.rsplit_once('}').expect("labels end").0),
            None => (line.split(' ').next().expect("a name"), ""),
        };
        let base = ["", "_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|suffix| name.strip_suffix(suffix))
            .find(|base| all.contains_key(*base))
            .unwrap_or_else(|| panic!("{name} has a sample before its type"));
        let labels = labels.split("\",").filter_map(|label| label.split_once('='));
        let labels = labels.map(|(label, _)| label.to_owned()).filter(|label| label != "le");
        all.get_mut(base).expect("found above").1.extend(labels);
    }
    all
}

/// The rows of the page's tables of metrics.
fn documented(page: &str) -> BTreeMap<String, Kind> {
    let rows = page.lines().filter_map(|line| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, name, kind, labels, _, _] = cells.as_slice() else { return None };
        let name = name.strip_prefix('`')?.strip_suffix('`')?;
        let labels = labels.split(", ").filter(|label| !label.is_empty()).map(str::to_owned);
        Some((name.to_owned(), ((*kind).to_owned(), labels.collect())))
    });
    rows.collect()
}

#[test]
fn the_page_lists_what_the_servers_tell_and_the_linter_is_content() {
    let model = root().join("tests/goldens/public").join(MODEL);
    let flags = ["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--kv-memory", "4M"];
    let model = model.to_str().expect("a path of text");
    let up = Process::lockstep(&[&flags[..], &["--threads", "1", "--model", model]].concat());
    let http = up.address("http");
    for (prompt, status) in [(json!("Once"), 200), (json!(""), 400)] {
        let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 3, "ignore_eos": true});
        let reply = exchange(http, "POST", "/v1/completions", body.to_string().as_bytes());
        assert_eq!(reply.status, status, "{reply:?}");
    }
    let texts =
        ["http", "worker"].map(|part| exchange(up.address(part), "GET", "/metrics", b"").body);
    let mut told = declared(&texts[0]);
    for (name, kind) in declared(&texts[1]) {
        let other = told.insert(name.clone(), kind);
        assert_eq!(other.is_some(), name.starts_with("process_"), "{name} in both servers");
    }
    let page = fs::read_to_string(root().join("docs/metrics.md")).expect("the page");
    assert_eq!(told, documented(&page), "left: the servers, right: docs/metrics.md");
    for text in &texts {
        lint(text);
    }
}

fn lint(text: &str) {
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let Ok(mut promtool) = command.stderr(Stdio::piped()).spawn() else {
        eprintln!("SKIPPED: no promtool; apt-get install prometheus brings it");
        return;
    };
    // The pipe closes with the value.
    promtool.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("it reads");
    let output = promtool.wait_with_output().expect("it ends");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.is_empty(), "{said}\n{text}");
}
