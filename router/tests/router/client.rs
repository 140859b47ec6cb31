//! A plain HTTP/1.1 client, one connection a request or several.

use serde_json::Value;
use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

pub struct Http(pub SocketAddr);

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: String,
    pub body: String,
}

/// A connection that is kept.
pub struct Connection(pub TcpStream);

/// The bytes of a request that keeps its connection.
pub fn request(head: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("{head}\r\nhost: test\r\ncontent-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

impl Connection {
    pub async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    /// Everything up to the connection's end.
    pub async fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let read = timeout(Duration::from_secs(20), self.0.read_to_end(&mut bytes)).await;
        read.expect("an end within 20 s").expect("no reset");
        bytes
    }

    /// The next answer; the connection stays.
    pub async fn reply(&mut self) -> Reply {
        let mut bytes = Vec::new();
        while !bytes.ends_with(b"\r\n\r\n") {
            let read = timeout(Duration::from_secs(20), self.0.read_u8()).await;
            bytes.push(read.expect("an answer within 20 s").expect("an answer"));
        }
        let mut reply = parse(&bytes);
        let length = reply.header("content-length").expect("a length").parse().unwrap();
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).await.unwrap();
        reply.body = String::from_utf8(body).unwrap();
        reply
    }
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }

    /// The data of every event; comments are left out.
    pub fn events(&self) -> Vec<String> {
        let blocks = self.body.split("\n\n").filter(|block| !block.is_empty());
        blocks
            .filter(|block| !block.starts_with(':'))
            .map(|block| block.strip_prefix("data: ").expect(block).to_owned())
            .collect()
    }

    /// Every event but `[DONE]`, which must be the last.
    pub fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// The error's message, after checking the shape and status.
    pub fn refusal(&self, status: u16, param: Option<&str>) -> String {
        let json = self.json();
        assert_eq!(self.status, status, "{json}");
        assert_eq!(json["error"]["param"].as_str(), param, "{json}");
        assert!(json["error"]["type"].is_string(), "{json}");
        json["error"]["message"].as_str().unwrap().to_owned()
    }
}

impl Http {
    pub async fn get(&self, path: &str) -> Reply {
        self.send(&format!("GET {path} HTTP/1.1\r\n"), b"").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(&format!("POST {path} HTTP/1.1\r\n"), body.to_string().as_bytes()).await
    }

    /// A connection that is kept.
    pub async fn connect(&self) -> Connection {
        Connection(TcpStream::connect(self.0).await.unwrap())
    }

    /// Sends and hands over the connection.
    pub async fn open(&self, head: &str, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.0).await.unwrap();
        let length = body.len();
        let head = format!(
            "{head}host: test\r\ncontent-type: application/json\r\nconnection: close\r\n\
             content-length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        stream
    }

    pub async fn send(&self, head: &str, body: &[u8]) -> Reply {
        let mut stream = self.open(head, body).await;
        let mut bytes = Vec::new();
        timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes))
            .await
            .expect("an answer within 20 s")
            .unwrap();
        parse(&bytes)
    }
}

pub fn parse(bytes: &[u8]) -> Reply {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("headers");
    let headers = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = headers.split(' ').nth(1).unwrap().parse().unwrap();
    let mut rest = &bytes[end + 4..];
    let mut body = Vec::new();
    if headers.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        loop {
            let line = rest.windows(2).position(|w| w == b"\r\n").expect("chunk size");
            let size = std::str::from_utf8(&rest[..line]).unwrap();
            let size = usize::from_str_radix(size, 16).unwrap();
            if size == 0 {
                break;
            }
            body.extend_from_slice(&rest[line + 2..line + 2 + size]);
            rest = &rest[line + 4 + size..];
        }
    } else {
        body.extend_from_slice(rest);
    }
    Reply { status, headers, body: String::from_utf8(body).unwrap() }
}
