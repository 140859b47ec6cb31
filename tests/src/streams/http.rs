//! One streamed completion over HTTP.

use std::{
    io::{BufRead, BufReader, ErrorKind, Write},
    iter,
    net::TcpStream,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{DEADLINE, Reader};
use crate::http::request_named;

const PATH: &str = "/v1/completions";

/// Between two looks at whether the client is to go away.
const LOOK: Duration = Duration::from_millis(20);

pub fn read(reader: &mut Reader, router: &str, id: &str, body: &Value) {
    let mut stream = match TcpStream::connect(router) {
        Ok(stream) => stream,
        Err(error) => return reader.failed(format!("connecting: {error}")),
    };
    stream.set_read_timeout(Some(LOOK)).expect("a timeout");
    if let Err(error) = stream.write_all(&request_named(id, PATH, body.to_string().as_bytes())) {
        return reader.failed(format!("asking: {error}"));
    }
    let mut stream = BufReader::new(stream);
    let Some(head) = line(reader, &mut stream) else {
        return reader.failed("no head came".to_owned());
    };
    if head.split(' ').nth(1) != Some("200") {
        let rest = iter::from_fn(|| line(reader, &mut stream)).last().unwrap_or_default();
        return reader.failed(format!("{head}: {rest}"));
    }
    reader.accepted();
    while let Some(line) = line(reader, &mut stream) {
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            return reader.heard();
        }
        take(reader, &serde_json::from_str(data).expect("JSON"));
        reader.heard();
    }
    reader.failed("the stream broke off".to_owned());
}

/// The next line; `None` where there is none, or nobody waits for it any more.
fn line(reader: &Reader, stream: &mut BufReader<TcpStream>) -> Option<String> {
    let (mut bytes, began) = (Vec::new(), Instant::now());
    loop {
        match stream.read_until(b'\n', &mut bytes) {
            Ok(_) if bytes.ends_with(b"\n") => {
                let line = String::from_utf8(bytes).expect("text");
                return Some(line.trim_end_matches(['\r', '\n']).to_owned());
            }
            Ok(_) => return None,
            // What has come of the line so far stays.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if began.elapsed() > DEADLINE || reader.pulse.left.load(Ordering::SeqCst) {
                    return None;
                }
            }
            Err(_) => return None,
        }
    }
}

fn take(reader: &mut Reader, event: &Value) {
    if let Some(error) = event.get("error") {
        reader.failed(error.to_string());
    }
    if let Some(usage) = event.get("usage").filter(|usage| !usage.is_null()) {
        let mut usage = usage.clone();
        // What was in a cache depends on where it ran.
        usage.as_object_mut().expect("an object").remove("prompt_tokens_details");
        reader.answer.usage = Some(usage);
    }
    for choice in event["choices"].as_array().into_iter().flatten() {
        let logprobs = &choice["logprobs"];
        let listed = |name: &str| logprobs[name].as_array().cloned().unwrap_or_default();
        let (tokens, values) = (listed("tokens"), listed("token_logprobs"));
        let others = listed("top_logprobs");
        let told = tokens.iter().zip(values).enumerate().map(|(at, (token, value))| {
            format!("{token} {value} {}", others.get(at).unwrap_or(&Value::Null))
        });
        let index = choice["index"].as_u64().expect("an index");
        let known = reader.choice(index, tokens.len());
        known.text += choice["text"].as_str().unwrap_or_default();
        known.tokens.extend(told);
        if let Some(finish) = choice["finish_reason"].as_str() {
            known.finish = Some(finish.to_owned());
        }
    }
}
