//! The same shapes by PyTorch, where a `python3` has it.

use crate::process::{self, Ended, Limits};
use checks::bench::{Bench, Peer, Report};
use cuda::Driver;
use serde_json::{Value, json};
use std::{
    process::Command,
    time::{Duration, Instant},
};

const SCRIPT: &str = include_str!("../../torch_peer.py");

/// Asks for the shapes of all benches that have an outcome and a peer, and puts the figures beside.
///
/// # Errors
/// Says why there are none, or why not all.
pub fn ask<D: Driver>(
    benches: &[Bench<D>],
    report: &mut Report,
    seconds: u64,
) -> Result<(), String> {
    let peer = |outcome| benches.iter().find(|bench| bench.same(outcome)).and_then(|b| b.peer);
    let mut asked = Vec::new();
    for (at, outcome) in report.outcomes.iter_mut().enumerate() {
        outcome.peer_seconds = None;
        asked.extend(peer(outcome).map(|peer| (at, peer)));
    }
    if asked.is_empty() {
        return Err("no figures to set PyTorch's beside: run the benches first".into());
    }
    let shapes: Vec<Value> = asked.iter().map(|(_, peer)| question(*peer)).collect();
    // It takes long to load; then it has a line for each shape.
    let silence = Duration::from_secs(seconds);
    let limits = Limits { end: Instant::now() + silence, silence };
    let mut asked = asked.into_iter();
    let mut command = Command::new("python3");
    let command = command.args(["-c", SCRIPT]);
    let ended = process::run(command, &json!(shapes).to_string(), limits, |line| {
        let Ok(answer) = serde_json::from_str::<Value>(line) else { return };
        if let Some(name) = answer["name"].as_str() {
            report.about.peer = Some(name.to_owned());
        } else if let Some((at, _)) = asked.next() {
            let outcome = &mut report.outcomes[at];
            outcome.peer_seconds = answer["seconds"].as_f64();
            eprintln!("{} {}: PyTorch {answer}", outcome.op, outcome.shape);
        }
    })?;
    let left = asked.count();
    match ended {
        Ended::By(status) if status.success() && left == 0 => Ok(()),
        Ended::By(status) => Err(format!("python3 ended ({status}), {left} shapes missing")),
        Ended::Killed(why) => Err(format!("python3 was ended: {why}, {left} shapes missing")),
    }
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
