//! One HTTP exchange at a time, by hand: tests say every byte that they send.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(300);

/// What came back.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub body: String,
}

impl Reply {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        let parsed = serde_json::from_str(&self.body);
        parsed.unwrap_or_else(|error| panic!("{error} in {}", self.body))
    }
}

/// The bytes of a request; with HTTP/1.0 the answer ends with the connection.
pub fn request(method: &str, path: &str, body: &[u8]) -> Vec<u8> {
    request_with(method, path, "", body)
}

fn request_with(method: &str, path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.0\r\nHost: test\r\nContent-Type: application/json\r\n\
         {headers}Content-Length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// A request that logs know by a name; an empty one leaves the naming to the server.
pub fn request_named(id: &str, path: &str, body: &[u8]) -> Vec<u8> {
    let name = if id.is_empty() { String::new() } else { format!("X-Request-Id: {id}\r\n") };
    request_with("POST", path, &name, body)
}

/// Sends a request and reads the whole answer.
pub fn exchange(address: &str, method: &str, path: &str, body: &[u8]) -> Reply {
    let mut stream = TcpStream::connect(address).expect("a server");
    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    stream.write_all(&request(method, path, body)).expect("a server that reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer in time");
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    Reply { status: status.unwrap_or_else(|| panic!("{answer:?}")), body: body.to_owned() }
}
