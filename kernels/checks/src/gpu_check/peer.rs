//! The same shapes by PyTorch, where a `python3` has it.

use checks::bench::{Bench, Outcome, Peer};
use kernels::cuda::Gpu;
use serde_json::{Value, json};
use std::{
    io::Write,
    process::{Command, Stdio},
};

const SCRIPT: &str = include_str!("../../torch_peer.py");

/// What PyTorch says.
pub struct Answer {
    /// Its version.
    pub name: String,
    /// For each bench that has a peer, in order.
    seconds: Vec<Option<f64>>,
}

impl Answer {
    /// Puts the figures beside those of the same bench.
    pub fn fill(&self, benches: &[Bench<Gpu>], outcomes: &mut [Outcome]) {
        let asked = benches.iter().filter(|bench| bench.peer.is_some());
        for (bench, seconds) in asked.zip(&self.seconds) {
            let same = |o: &&mut Outcome| o.op == bench.op && o.shape == bench.shape;
            if let Some(outcome) = outcomes.iter_mut().find(same) {
                outcome.peer_seconds = *seconds;
            }
        }
    }
}

/// Runs the script once for all shapes. It bounds its own time.
pub fn ask(benches: &[Bench<Gpu>]) -> Result<Answer, String> {
    let asked: Vec<Value> = benches.iter().filter_map(|bench| bench.peer).map(question).collect();
    let mut child = Command::new("python3")
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("python3 does not start: {error}"))?;
    let mut input = child.stdin.take().ok_or("a pipe was asked for")?;
    input.write_all(json!(asked).to_string().as_bytes()).map_err(|error| error.to_string())?;
    drop(input);
    let done = child.wait_with_output().map_err(|error| error.to_string())?;
    if !done.status.success() {
        return Err(format!("python3 ended ({})", done.status));
    }
    let answer: Value = serde_json::from_slice(&done.stdout).map_err(|error| error.to_string())?;
    let name = answer["name"].as_str().ok_or("no name in PyTorch's answer")?.to_owned();
    let seconds = answer["seconds"].as_array().ok_or("no figures in PyTorch's answer")?;
    Ok(Answer { name, seconds: seconds.iter().map(Value::as_f64).collect() })
}

fn question(peer: Peer) -> Value {
    match peer {
        Peer::Attention { batch, rows, context, heads } => json!({
            "kind": "attention",
            "batch": batch,
            "rows": rows,
            "context": context,
            "q_heads": heads.q,
            "kv_heads": heads.kv,
            "dim": heads.dim,
        }),
        Peer::Product { m, n, k } => json!({ "kind": "product", "m": m, "n": n, "k": k }),
    }
}
