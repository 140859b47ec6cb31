//! What a connection goes through: several requests, halves that close, clients that leave, HTTP/2.

use crate::{
    Cluster, MODEL, TEXT,
    client::{Reply, parse, request},
    config, soon,
};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

const POST: &str = "POST /v1/completions HTTP/1.1";

fn body(extra: Value) -> String {
    let mut body = json!({"model": MODEL, "prompt": "Once upon", "max_tokens": 100});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body.to_string()
}

fn text(reply: &Reply) -> String {
    match reply.header("content-type") {
        Some("text/event-stream") => {
            let chunks = reply.chunks();
            chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect()
        }
        _ => reply.json()["choices"][0]["text"].as_str().unwrap().to_owned(),
    }
}

#[tokio::test]
async fn refusals_leave_the_connection_as_it_was() {
    let mut config = config();
    config.limits.in_flight_max = 1;
    let cluster = Cluster::start(config, 1).await;
    cluster.worker().say(&"endless ".repeat(300));
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(10);
    let long = body(json!({"max_tokens": 1000}));
    let _held = cluster.http().open(&format!("{POST}\r\n"), long.as_bytes()).await;
    soon("the only place is taken", || cluster.worker().live() == 1).await;

    // Bodies that are read by nobody, up to what the router takes all the same.
    let some = vec![b'x'; 900_000];
    let mut connection = cluster.http().connect().await;
    for _ in 0..3 {
        for (head, body, status) in [
            ("POST /v1/nothing HTTP/1.1", &some[..], 404),
            ("DELETE /v1/completions HTTP/1.1", &some[..], 405),
            ("GET /v1/models HTTP/1.1", &some[..1000], 200),
            (POST, long.as_bytes(), 429),
            (POST, &some[..60_000], 429),
            (POST, &some[..], 429),
            ("GET /health HTTP/1.1", b"", 200),
        ] {
            connection.send(&request(head, body)).await;
            let reply = connection.reply().await;
            assert_eq!(reply.status, status, "{head}: {reply:?}");
            assert_eq!(reply.header("connection"), None, "{head}: {reply:?}");
        }
    }
    let chunked = "POST /v1/nothing HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n\
                   5\r\nhello\r\n0\r\n\r\n";
    connection.send(chunked.as_bytes()).await;
    assert_eq!(connection.reply().await.status, 404);
    connection.send(&request("GET /health HTTP/1.1", b"")).await;
    assert_eq!(connection.reply().await.status, 200);
}

#[tokio::test]
async fn a_body_over_the_limit_leaves_the_connection_too() {
    let cluster = Cluster::one().await;
    let mut connection = cluster.http().connect().await;
    let large = vec![b' '; 300_000];
    for _ in 0..2 {
        connection.send(&request(POST, &large)).await;
        connection.reply().await.refusal(413, None);
        let head = format!("{POST}\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n493e0\r\n");
        connection.send(&[head.as_bytes(), &large, b"\r\n0\r\n\r\n"].concat()).await;
        connection.reply().await.refusal(413, None);
        connection.send(&request(POST, body(json!({})).as_bytes())).await;
        assert_eq!(text(&connection.reply().await), TEXT);
    }
}

#[tokio::test]
async fn what_is_too_much_to_take_is_answered_all_the_same() {
    let cluster = Cluster::one().await;
    let large = vec![b'x'; 8 << 20];
    for head in ["POST /v1/nothing HTTP/1.1", "PUT /v1/completions HTTP/1.1", POST] {
        let mut connection = cluster.http().connect().await;
        let (mut read, mut write) = connection.0.split();
        let bytes = request(head, &large);
        let mut answer = Vec::new();
        let (sent, read) = tokio::join!(write.write_all(&bytes), async {
            timeout(Duration::from_secs(20), read.read_to_end(&mut answer)).await.expect("an end")
        });
        sent.expect("every byte is taken");
        read.expect("no reset");
        let reply = parse(&answer);
        assert!([404, 405, 413].contains(&reply.status), "{reply:?}");
        assert_eq!(reply.header("connection"), Some("close"), "{reply:?}");
        assert!(reply.json()["error"]["message"].is_string());
    }
}

#[tokio::test]
async fn a_client_that_asks_before_it_sends_keeps_what_is_refused() {
    let cluster = Cluster::one().await;
    let mut connection = cluster.http().connect().await;
    let head = "POST /v1/nothing HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\n\
                content-length: 1000000\r\n\r\n";
    connection.send(head.as_bytes()).await;
    let reply = parse(&connection.rest().await);
    assert_eq!((reply.status, reply.header("connection")), (404, Some("close")));
    let mut connection = cluster.http().connect().await;
    let asked = body(json!({}));
    let length = asked.len();
    let head =
        format!("{POST}\r\nhost: test\r\nexpect: 100-continue\r\ncontent-length: {length}\r\n\r\n");
    connection.send(head.as_bytes()).await;
    let mut go_on = [0; 25];
    connection.0.read_exact(&mut go_on).await.unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    connection.send(asked.as_bytes()).await;
    assert_eq!(text(&connection.reply().await), TEXT);
}

/// Long enough that the router asks twice whether its client is still there.
#[tokio::test]
async fn a_half_closed_connection_gets_its_answer() {
    let cluster = Cluster::one().await;
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(120);
    for (version, stream) in [("1.1", false), ("1.0", false), ("1.1", true), ("1.0", true)] {
        let mut connection = cluster.http().connect().await;
        let head = format!("POST /v1/completions HTTP/{version}");
        let body = body(json!({"stream": stream}));
        connection.send(&request(&head, body.as_bytes())).await;
        connection.0.shutdown().await.unwrap();
        let reply = parse(&connection.rest().await);
        assert!(reply.headers.starts_with(&format!("HTTP/{version} 200 OK\r\n")), "{reply:?}");
        assert_eq!(text(&reply), TEXT, "HTTP/{version}, stream: {stream}");
    }
    let two = [request(POST, body(json!({})).as_bytes()), request(POST, b"{}")].concat();
    let mut connection = cluster.http().connect().await;
    connection.send(&two).await;
    connection.0.shutdown().await.unwrap();
    assert_eq!(text(&connection.reply().await), TEXT);
    connection.reply().await.refusal(400, Some("prompt"));
    assert!(connection.rest().await.is_empty());
}

#[tokio::test]
async fn a_client_that_leaves_is_told_from_one_that_listens() {
    let cluster = Cluster::one().await;
    cluster.worker().say(&"endless ".repeat(300));
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(10);
    for version in ["1.0", "1.1"] {
        for (stream, first) in [(false, 0), (true, 0), (false, 300)] {
            let head = format!("POST /v1/completions HTTP/{version}");
            let body = body(json!({"stream": stream, "max_tokens": 1000}));
            let mut connection = cluster.http().connect().await;
            connection.send(&request(&head, body.as_bytes())).await;
            soon("it runs", || cluster.worker().live() == 1).await;
            if first > 0 {
                connection.0.shutdown().await.unwrap();
                tokio::time::sleep(Duration::from_millis(first)).await;
                assert_eq!(cluster.worker().live(), 1, "it still listens");
            }
            drop(connection);
            soon("it is cancelled", || cluster.worker().live() == 0).await;
        }
    }
}

#[tokio::test]
async fn a_stream_without_words_ends_with_its_client() {
    let mut config = config();
    config.deadlines.silence = Duration::from_secs(60);
    let cluster = Cluster::start(config, 1).await;
    // What a client leaves unread in its socket resets the connection; what it has read does not.
    for reads in [false, true] {
        cluster.worker().fault(crate::worker::Fault::Silence(0));
        let mut connection = cluster.http().connect().await;
        let body = body(json!({"stream": true}));
        connection.send(&request(POST, body.as_bytes())).await;
        soon("it runs", || cluster.worker().live() == 1).await;
        if reads {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(connection.0.read_u8().await.expect("the head"));
            }
        }
        drop(connection);
        soon("it is cancelled", || cluster.worker().live() == 0).await;
    }
}

#[tokio::test]
async fn a_connection_without_a_request_is_closed() {
    let mut config = config();
    config.deadlines.headers = Duration::from_millis(300);
    let cluster = Cluster::start(config, 1).await;
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(50);
    let (http, grpc) = (cluster.router.http().unwrap(), cluster.router.grpc().unwrap());
    for (address, bytes) in [
        (http, ""),
        (http, "POST /v1/comp"),
        (http, "PRI * HTTP/2.0\r\n"),
        (http, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        (grpc, ""),
        (grpc, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(bytes.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let read = timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await;
        assert!(read.is_ok(), "{bytes:?} is waited for without end");
    }
    let asked = body(json!({}));
    let reply = cluster.http().send(&format!("{POST}\r\n"), asked.as_bytes()).await;
    assert_eq!(text(&reply), TEXT, "an answer may take longer");
}

#[tokio::test]
async fn connections_are_counted_on_both_ports() {
    let mut config = config();
    config.limits.connections_max = 1;
    let cluster = Cluster::start(config, 0).await;
    for address in [cluster.router.http().unwrap(), cluster.router.grpc().unwrap()] {
        let ask = async |mut stream: TcpStream| {
            stream.write_all(b"GET /health HTTP/1.0\r\n\r\n").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut some = Vec::new();
            drop(stream.read_to_end(&mut some).await);
        };
        let first = TcpStream::connect(address).await.unwrap();
        // The one that `start` used is gone, or on its way.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let second = TcpStream::connect(address).await.unwrap();
        let mut second = std::pin::pin!(ask(second));
        let waits = timeout(Duration::from_millis(200), second.as_mut()).await;
        assert!(waits.is_err(), "{address} serves a second one");
        drop(first);
        timeout(Duration::from_secs(10), second).await.expect("its turn");
    }
}

#[tokio::test]
async fn http_2_is_spoken_without_an_upgrade() {
    let cluster = Cluster::one().await;
    let stream = TcpStream::connect(cluster.http().0).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    let connection = tokio::spawn(connection);
    let ask = async |method: &str, path: &str, body: Vec<u8>| {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://test{path}"))
            .body(Full::new(Bytes::from(body)))
            .unwrap();
        let reply = sender.clone().send_request(request).await.unwrap();
        let status = reply.status();
        let body = reply.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    };
    let path = "/v1/completions";
    let (whole, stream, wrong, large, models) = tokio::join!(
        ask("POST", path, body(json!({})).into()),
        ask("POST", path, body(json!({"stream": true})).into()),
        ask("POST", "/v1/nothing", vec![b'x'; 900_000]),
        ask("POST", path, vec![b'x'; 900_000]),
        ask("GET", "/v1/models", Vec::new()),
    );
    assert_eq!(whole.0, StatusCode::OK);
    let whole: Value = serde_json::from_str(&whole.1).unwrap();
    assert_eq!(whole["choices"][0]["text"], TEXT);
    assert_eq!(stream.0, StatusCode::OK);
    assert!(stream.1.ends_with("data: [DONE]\n\n"), "{}", stream.1);
    assert_eq!((wrong.0, large.0), (StatusCode::NOT_FOUND, StatusCode::PAYLOAD_TOO_LARGE));
    assert_eq!(models.0, StatusCode::OK);
    // A request that its client gives up is cancelled; the connection goes on.
    cluster.worker().say(&"endless ".repeat(300));
    *cluster.worker().pace.lock().unwrap() = Duration::from_millis(10);
    let given_up = ask("POST", path, body(json!({"max_tokens": 1000})).into());
    assert!(timeout(Duration::from_millis(300), given_up).await.is_err());
    soon("it is cancelled", || cluster.worker().live() == 0).await;
    assert_eq!(ask("GET", "/health", Vec::new()).await.0, StatusCode::OK);
    cluster.shutdown.send_replace(true);
    timeout(Duration::from_secs(5), connection).await.expect("the end").unwrap().unwrap();
}
