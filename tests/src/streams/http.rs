//! One streamed completion over HTTP.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpStream,
};

use serde_json::Value;

use super::{DEADLINE, Reader};
use crate::http::request_named;

const PATH: &str = "/v1/completions";

pub fn read(reader: &mut Reader, router: &str, id: &str, body: &Value) {
    let mut stream = match TcpStream::connect(router) {
        Ok(stream) => stream,
        Err(error) => return reader.failed(format!("connecting: {error}")),
    };
    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    let other = stream.try_clone().expect("another descriptor");
    *reader.pulse.connection.lock().expect("no panic in there") = Some(other);
    if let Err(error) = stream.write_all(&request_named(id, PATH, body.to_string().as_bytes())) {
        return reader.failed(format!("asking: {error}"));
    }
    let mut lines = BufReader::new(stream).lines();
    let head = match lines.next() {
        Some(Ok(head)) => head,
        other => return reader.failed(format!("no head came: {other:?}")),
    };
    if head.split(' ').nth(1) != Some("200") {
        let rest: Vec<String> = lines.map_while(Result::ok).collect();
        let last = rest.last().cloned().unwrap_or_default();
        return reader.failed(format!("{head}: {last}"));
    }
    reader.accepted();
    for line in lines {
        let Ok(line) = line else { break };
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            return reader.heard();
        }
        take(reader, &serde_json::from_str(data).expect("JSON"));
        reader.heard();
    }
    reader.failed("the stream broke off".to_owned());
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
