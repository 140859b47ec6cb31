//! Clients that connect, send and vanish at random moments leave nothing behind.

use std::{
    env, fs,
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tests::{Process, exchange, request, wait_for};

const CLIENTS: u64 = 200;
const SETTLE: Duration = Duration::from_secs(10);
const STAY_MILLIS_MAX: u64 = 800;

/// Numbers that only look random (SplitMix64), the same in every run.
struct Draws(u64);

impl Draws {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

fn chat(model: &str, client: u64, more: Value) -> Vec<u8> {
    let question = format!("Client {client} asks: tell me a long story about the sea.");
    let messages = [json!({"role": "user", "content": question})];
    let mut body = json!({
        "model": model, "messages": messages, "max_tokens": 200, "ignore_eos": true,
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request("POST", "/v1/chat/completions", body.to_string().as_bytes())
}

/// One visit: what is sent, and whether some of the answer is read before leaving.
fn visit(up: &Addresses, client: u64, draws: &mut Draws) -> std::io::Result<()> {
    let kind = draws.below(7);
    let to = if kind == 6 { &up.grpc } else { &up.http };
    let mut stream = TcpStream::connect(to)?;
    let stay = Duration::from_millis(draws.below(STAY_MILLIS_MAX));
    stream.set_read_timeout(Some(stay.max(Duration::from_millis(1))))?;
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    let bytes = match kind {
        0 | 1 => chat(&up.model, client, json!({"stream": true})),
        2 => chat(&up.model, client, json!({})),
        3 => chat(&up.model, client, json!({"n": 3, "stream": true})),
        4 => {
            let mut whole = chat(&up.model, client, json!({"stream": true}));
            whole.truncate(draws.below(whole.len() as u64) as usize);
            whole
        }
        5 => (0..draws.below(2000)).map(|_| draws.below(256) as u8).collect(),
        _ => {
            let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
            bytes.extend((0..draws.below(200)).map(|_| draws.below(256) as u8));
            bytes
        }
    };
    stream.write_all(&bytes)?;
    if draws.below(2) == 0 {
        // Either some bytes or the end of the stay.
        stream.read(&mut [0; 512]).map(drop)
    } else {
        thread::sleep(stay);
        Ok(())
    }
}

struct Addresses {
    http: String,
    grpc: String,
    worker: String,
    model: String,
}

/// The value of a gauge.
fn gauge(address: &str, name: &str) -> u64 {
    let text = exchange(address, "GET", "/metrics", b"").body;
    let value = text.lines().find_map(|line| {
        let (labels, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
        (labels.is_empty() || labels.starts_with('{')).then(|| value.parse().ok())?
    });
    value.unwrap_or_else(|| panic!("no {name} in {text}"))
}

/// Open files of a process; `None` where the system does not tell.
fn open_files(pid: u32) -> Option<usize> {
    Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count())
}

fn seconds() -> Duration {
    let set = env::var("LOCKSTEP_VANISH_SECONDS").ok();
    Duration::from_secs(set.map_or(5, |seconds| seconds.parse().expect("a whole number")))
}

fn ask(up: &Addresses) {
    let body = json!({
        "model": up.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4,
    });
    let path = "/v1/chat/completions";
    let reply = exchange(&up.http, "POST", path, body.to_string().as_bytes());
    assert_eq!(reply.status, 200, "{reply:?}");
}

#[test]
fn clients_that_vanish_leave_nothing_behind() {
    let process = Process::up(&["--tp", "2", "--threads", "1"]);
    let address = |name| process.address(name).to_owned();
    let (http, grpc, worker) = (address("http"), address("grpc"), address("worker"));
    let listed = exchange(&http, "GET", "/v1/models", b"").json();
    let model = listed["data"][0]["id"].as_str().unwrap().to_owned();
    let up = Addresses { http, grpc, worker, model };
    ask(&up);
    let files = open_files(process.pid());

    let end = Instant::now() + seconds();
    let visits: u64 = thread::scope(|scope| {
        let client = |client| {
            let up = &up;
            scope.spawn(move || {
                let (mut draws, mut visits) = (Draws(client), 0);
                while Instant::now() < end {
                    // A refused connection or a cut answer is the server's right.
                    let _cut = visit(up, client, &mut draws);
                    visits += 1;
                }
                visits
            })
        };
        let clients: Vec<_> = (0..CLIENTS).map(client).collect();
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    eprintln!("{visits} visits of {CLIENTS} clients");

    let blocks = gauge(&up.worker, "lockstep_worker_blocks_capacity");
    let worker = |name: &str| gauge(&up.worker, &format!("lockstep_worker_{name}"));
    let look = || {
        let router = gauge(&up.http, "lockstep_router_in_flight");
        let queued = gauge(&up.http, "lockstep_router_queued");
        let sequences = (worker("sequences_running"), worker("sequences_waiting"));
        (worker("blocks_free"), sequences, router, queued)
    };
    wait_for("all free", SETTLE, look, |seen| *seen == (blocks, (0, 0), 0, 0));
    if let Some(files) = files {
        let look = || open_files(process.pid()).unwrap_or(0);
        wait_for("connections closed", SETTLE, look, |now| *now <= files + 8);
    }
    assert!(worker("requests_cancelled_total") > 0, "nobody left in the middle");
    ask(&up);
}
