//! One HTTP/1.1 connection for many requests, one after the other.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Duration,
};

use crate::Reply;

const DEADLINE: Duration = Duration::from_secs(120);

/// An open connection.
pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    pub fn open(address: &str) -> Self {
        let stream = TcpStream::connect(address).expect("a server");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        stream.set_nodelay(true).expect("small messages at once");
        Self { stream: BufReader::new(stream) }
    }

    /// Sends a request and reads its answer to the end.
    pub fn exchange(&mut self, method: &str, path: &str, body: &[u8]) -> Reply {
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n"
        );
        let request = [head.as_bytes(), body].concat();
        self.stream.get_mut().write_all(&request).expect("a server that reads");
        self.reply()
    }

    fn reply(&mut self) -> Reply {
        let first = self.line();
        let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.unwrap_or_else(|| panic!("{first:?}"));
        let mut headers = String::new();
        loop {
            let line = self.line();
            if line.is_empty() {
                break;
            }
            headers.push_str(&line.to_ascii_lowercase());
            headers.push('\n');
        }
        let header = |name: &str| headers.lines().find_map(|line| line.strip_prefix(name));
        let length = header("content-length: ").map(|length| length.parse().expect("a number"));
        let body = match length {
            Some(length) => self.bytes(length),
            None => {
                assert_eq!(header("transfer-encoding: "), Some("chunked"), "{headers}");
                self.chunks()
            }
        };
        Reply { status, body: String::from_utf8(body).expect("text") }
    }

    fn chunks(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            let size = usize::from_str_radix(&self.line(), 16).expect("a chunk's size");
            body.extend(self.bytes(size));
            assert_eq!(self.line(), "", "the end of a chunk");
            if size == 0 {
                return body;
            }
        }
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).expect("the whole answer");
        bytes
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("an answer in time");
        line.trim_end().to_owned()
    }
}
