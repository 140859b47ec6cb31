//! How requests may come in: from web pages, compressed, too large.

use crate::{
    Cluster, MODEL, PATH, TEXT,
    client::{Reply, request},
    config,
};
use flate2::{
    Compression,
    read::{GzDecoder, GzEncoder, ZlibDecoder, ZlibEncoder},
};
use proto::v1::{
    GenerateRequest, TokenizeRequest, generate_request::Prompt, inference_client::InferenceClient,
};
use serde_json::{Value, json};
use std::io::Read;
use tonic::{Code, Request, codec::CompressionEncoding};

fn read(mut from: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).unwrap();
    bytes
}

fn pack(encoding: &str, bytes: &[u8]) -> Vec<u8> {
    match encoding {
        "gzip" => read(GzEncoder::new(bytes, Compression::best())),
        "deflate" => read(ZlibEncoder::new(bytes, Compression::best())),
        _ => zstd::encode_all(bytes, 19).unwrap(),
    }
}

fn unpack(encoding: &str, bytes: &[u8]) -> Vec<u8> {
    match encoding {
        "gzip" => read(GzDecoder::new(bytes)),
        "deflate" => read(ZlibDecoder::new(bytes)),
        _ => zstd::decode_all(bytes).unwrap(),
    }
}

async fn preflight(cluster: &Cluster, origin: &str) -> Reply {
    let head = format!(
        "OPTIONS /v1/chat/completions HTTP/1.1\r\norigin: {origin}\r\n\
         access-control-request-method: POST\r\n\
         access-control-request-headers: authorization,content-type,x-stainless-os\r\n"
    );
    cluster.http().send(&head, b"").await
}

#[tokio::test]
async fn pages_of_this_machine_may_call_and_others_may_not() {
    let cluster = Cluster::one().await;
    for origin in ["http://localhost:5173", "https://127.0.0.1", "http://[::1]:3000"] {
        let reply = preflight(&cluster, origin).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        assert_eq!(reply.header("access-control-allow-origin"), Some(origin));
        assert!(reply.header("access-control-allow-methods").unwrap().contains("POST"));
        let headers = reply.header("access-control-allow-headers").unwrap();
        assert_eq!(headers, "authorization,content-type,x-stainless-os");
    }
    let reply = preflight(&cluster, "https://foreign.example").await;
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, None));
    // Without a page behind it.
    let bare = cluster.http().send("OPTIONS /v1/chat/completions HTTP/1.1\r\n", b"").await;
    assert_eq!(bare.status, 200, "{bare:?}");

    // The call itself, answered or refused.
    for (body, status) in [(json!({"model": MODEL, "prompt": "x"}), 200), (json!({}), 400)] {
        let head = format!("POST {PATH} HTTP/1.1\r\norigin: http://localhost:5173\r\n");
        let reply = cluster.http().send(&head, body.to_string().as_bytes()).await;
        assert_eq!(reply.status, status, "{reply:?}");
        assert_eq!(reply.header("access-control-allow-origin"), Some("http://localhost:5173"));
        let exposed = reply.header("access-control-expose-headers").unwrap();
        assert!(exposed.contains("x-request-id") && exposed.contains("retry-after"), "{exposed}");
    }
}

#[tokio::test]
async fn named_origins_may_call_and_a_star_is_all() {
    let mut named = config();
    named.cors_origins = vec!["https://chat.example".to_owned(), "http://10.0.0.1:80".to_owned()];
    let cluster = Cluster::start(named, 0).await;
    for (origin, allowed) in [
        ("https://chat.example", true),
        ("http://10.0.0.1:80", true),
        ("http://localhost:1", true),
        ("https://chat.example:444", false),
        ("http://chat.example", false),
    ] {
        let reply = preflight(&cluster, origin).await;
        assert_eq!(reply.header("access-control-allow-origin").is_some(), allowed, "{origin}");
    }
    let mut any = config();
    any.cors_origins = vec!["*".to_owned()];
    let cluster = Cluster::start(any, 0).await;
    let reply = preflight(&cluster, "https://foreign.example").await;
    assert_eq!(reply.header("access-control-allow-origin"), Some("*"));

    let mut wrong = config();
    wrong.cors_origins = vec!["chat.example".to_owned()];
    let membership = std::sync::Arc::new(cluster.membership.clone());
    let started = router::Router::start(wrong, membership, cluster.shutdown.subscribe()).await;
    let error = started.err().expect("an error").to_string();
    assert!(error.contains("'chat.example' is no origin"), "{error}");
}

async fn post(cluster: &Cluster, encoding: &str, body: &[u8]) -> Reply {
    let mut connection = cluster.http().connect().await;
    let head = format!("POST {PATH} HTTP/1.1\r\ncontent-encoding: {encoding}");
    connection.send(&request(&head, body)).await;
    connection.reply().await
}

#[tokio::test]
async fn bodies_come_compressed() {
    let cluster = Cluster::one().await;
    let body = json!({"model": MODEL, "prompt": "Once upon", "max_tokens": 100}).to_string();
    for encoding in ["gzip", "deflate", "zstd"] {
        let reply = post(&cluster, encoding, &pack(encoding, body.as_bytes())).await;
        assert_eq!(reply.json()["choices"][0]["text"], TEXT, "{encoding}: {reply:?}");
        // What is small on the way may be large.
        let bomb = pack(encoding, &vec![b' '; 50 << 20]);
        assert!(bomb.len() < 64 << 10, "{encoding}: {}", bomb.len());
        let words = post(&cluster, encoding, &bomb).await.refusal(413, None);
        assert!(words.contains("65536"), "{words}");
        let broken = &pack(encoding, body.as_bytes())[..20];
        post(&cluster, encoding, broken).await.refusal(400, None);
        post(&cluster, encoding, body.as_bytes()).await.refusal(400, None);
    }
    assert_eq!(post(&cluster, "identity", body.as_bytes()).await.status, 200);
    let words = post(&cluster, "br", body.as_bytes()).await.refusal(415, None);
    assert!(words.contains("'br'") && words.contains("zstd"), "{words}");
}

#[tokio::test]
async fn answers_go_compressed_where_it_helps() {
    let cluster = Cluster::one().await;
    cluster.worker().say(&"once more ".repeat(200));
    let ask = async |accept: &str, more: Value| {
        let mut body = json!({"model": MODEL, "prompt": "x", "max_tokens": 4000});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let head = format!("POST {PATH} HTTP/1.1\r\naccept-encoding: {accept}");
        let mut connection = cluster.http().connect().await;
        let head = format!("{head}\r\nconnection: close");
        connection.send(&request(&head, body.to_string().as_bytes())).await;
        let bytes = connection.rest().await;
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
        (String::from_utf8(bytes[..end].to_vec()).unwrap(), bytes[end..].to_vec())
    };
    for encoding in ["gzip", "deflate", "zstd"] {
        let (head, body) = ask(encoding, json!({})).await;
        assert!(head.contains(&format!("content-encoding: {encoding}")), "{head}");
        let body = unpack(encoding, &unchunk(&body));
        let json: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(json["choices"][0]["text"].as_str().unwrap().trim_end().len(), 1999);
    }
    for (accept, more) in [
        ("identity", json!({})),
        ("br", json!({})),
        ("gzip", json!({"stream": true})),
        ("gzip", json!({"max_tokens": 1})),
    ] {
        let (head, _) = ask(accept, more.clone()).await;
        assert!(!head.contains("content-encoding"), "{accept} {more}: {head}");
    }
}

/// The data of a chunked body.
fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    while let Some(line) = bytes.windows(2).position(|w| w == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..line]).unwrap(), 16).unwrap();
        data.extend_from_slice(&bytes[line + 2..line + 2 + size]);
        bytes = &bytes[line + 4 + size..];
    }
    data
}

fn generate(text: &str) -> GenerateRequest {
    let prompt = Some(Prompt::Text(text.to_owned()));
    GenerateRequest { model: MODEL.to_owned(), prompt, ..GenerateRequest::default() }
}

#[tokio::test]
async fn grpc_is_compressed_as_the_client_does() {
    let cluster = Cluster::one().await;
    let address = format!("http://{}", cluster.router.grpc().unwrap());
    for (encoding, name) in [
        (CompressionEncoding::Gzip, "gzip"),
        (CompressionEncoding::Deflate, "deflate"),
        (CompressionEncoding::Zstd, "zstd"),
    ] {
        let client = InferenceClient::connect(address.clone()).await.unwrap();
        let mut client = client.accept_compressed(encoding);
        let plain = client.generate(generate("Once upon a time")).await.unwrap();
        assert!(plain.metadata().get("grpc-encoding").is_none(), "a plain one is answered plainly");
        let mut client = client.send_compressed(encoding);
        let mut packed = client.generate(generate("Once upon a time")).await.unwrap();
        assert_eq!(packed.metadata().get("grpc-encoding").unwrap(), name);
        let mut text = String::new();
        while let Some(chunk) = packed.get_mut().message().await.unwrap() {
            text += &chunk.text;
        }
        assert_eq!(text, TEXT, "{name}");
        let bomb = "x".repeat(1 << 20);
        let status = client.generate(generate(&bomb)).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    }
}

#[tokio::test]
async fn a_message_over_the_limit_exhausts_it() {
    let cluster = Cluster::one().await;
    let mut client = cluster.grpc().await;
    let text = "x".repeat(100_000);
    let status = client.generate(generate(&text)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains("65536 bytes"), "{status}");
    let long = TokenizeRequest { model: MODEL.into(), text, ..TokenizeRequest::default() };
    let status = client.tokenize(Request::new(long)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(client.generate(generate("x")).await.is_ok(), "the connection goes on");
}
