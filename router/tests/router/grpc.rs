//! The gRPC service, health and reflection.

use crate::{Cluster, MODEL, TEXT, config, worker::language};
use proto::v1::{
    ChatRequest, GenerateRequest, GenerateResponse, Message, Sampling, TokenIds, TokenizeRequest,
    generate_request::Prompt,
};
use serde_json::{Value, json};
use std::{collections::HashMap, time::Duration};
use tokio_stream::StreamExt;
use tonic::{Code, Request, Streaming};

pub async fn collect(mut stream: Streaming<GenerateResponse>) -> Vec<GenerateResponse> {
    let mut all = Vec::new();
    while let Some(chunk) = stream.next().await {
        all.push(chunk.unwrap());
    }
    all
}

async fn channel(cluster: &Cluster) -> tonic::transport::Channel {
    let address = format!("http://{}", cluster.router.grpc().unwrap());
    tonic::transport::Endpoint::from_shared(address).unwrap().connect().await.unwrap()
}

fn text(chunks: &[GenerateResponse]) -> String {
    chunks.iter().map(|chunk| chunk.text.as_str()).collect()
}

pub fn generate(prompt: Prompt, sampling: Sampling) -> GenerateRequest {
    GenerateRequest {
        model: MODEL.to_owned(),
        prompt: Some(prompt),
        sampling: Some(sampling),
        ..GenerateRequest::default()
    }
}

#[tokio::test]
async fn generate_streams_text_ids_and_usage() {
    let cluster = Cluster::one().await;
    let mut client = cluster.grpc().await;
    let sampling = Sampling { logprobs: Some(1), ..Sampling::default() };
    let mut request = Request::new(generate(Prompt::Text("Once".into()), sampling));
    request.metadata_mut().insert("x-request-id", "abc".parse().unwrap());
    let response = client.generate(request).await.unwrap();
    assert_eq!(response.metadata().get("x-request-id").unwrap(), "abc");
    let chunks = collect(response.into_inner()).await;
    assert_eq!(text(&chunks), TEXT);
    let mut expected = cluster.worker().answer.lock().unwrap().clone();
    expected.push(crate::worker::END);
    let ids: Vec<u32> = chunks.iter().flat_map(|c| &c.tokens).map(|token| token.id).collect();
    assert_eq!(ids, expected, "every sampled id, the stop id included");
    let last = chunks.last().unwrap();
    assert_eq!((last.finish_reason.as_str(), last.request_id.as_str()), ("stop", "abc"));
    assert_eq!(last.usage.unwrap().completion_tokens as usize, expected.len());
    assert!(chunks[..chunks.len() - 1].iter().all(|chunk| chunk.usage.is_none()));
}

#[tokio::test]
async fn several_choices_of_ids_come_in_one_stream() {
    let cluster = Cluster::one().await;
    let sampling = Sampling {
        n: Some(2),
        max_tokens: Some(3),
        echo: true,
        ignore_eos: true,
        seed: Some(u64::MAX),
        stop_token_ids: vec![3],
        logit_bias: HashMap::from([(5, -1.0)]),
        ..Sampling::default()
    };
    let prompt = Prompt::Ids(TokenIds { ids: vec![7, 8, 9] });
    let chunks = cluster.grpc().await.generate(generate(prompt, sampling)).await.unwrap();
    let chunks = collect(chunks.into_inner()).await;
    for choice in 0..2 {
        let own: Vec<_> = chunks.iter().filter(|chunk| chunk.choice == choice).cloned().collect();
        let ids: Vec<u32> = own.iter().flat_map(|c| &c.tokens).map(|token| token.id).collect();
        assert_eq!(ids[..3], [7, 8, 9]);
        assert_eq!(ids.len(), 6);
        assert_eq!(own.last().unwrap().finish_reason, "length");
    }
    let usages: Vec<_> = chunks.iter().filter_map(|chunk| chunk.usage).collect();
    assert_eq!(usages.len(), 1);
    assert_eq!((usages[0].prompt_tokens, usages[0].completion_tokens), (3, 6));
    let run = cluster.worker().run(0);
    assert_eq!(run.stop_ids, [3]);
    assert_eq!(run.params.unwrap().logit_bias, HashMap::from([(5, -1.0)]));
    let mut seeds: Vec<_> =
        (0..2).map(|at| cluster.worker().run(at).params.unwrap().seed).collect();
    seeds.dedup();
    assert!(seeds.len() == 2 && seeds.contains(&u64::MAX), "{seeds:?}");
}

#[tokio::test]
async fn chat_and_tokenize_speak_the_models_language() {
    let cluster = Cluster::one().await;
    let mut client = cluster.grpc().await;
    let message = Message { role: "user".into(), content: "Hi".into(), ..Message::default() };
    let request =
        ChatRequest { model: MODEL.into(), messages: vec![message], ..ChatRequest::default() };
    let chunks = collect(client.chat(request).await.unwrap().into_inner()).await;
    assert_eq!(text(&chunks), TEXT);
    assert_eq!(cluster.worker().describes.load(std::sync::atomic::Ordering::SeqCst), 1);

    let long = "wörld ".repeat(2000);
    let request =
        TokenizeRequest { model: MODEL.into(), text: long.clone(), ..TokenizeRequest::default() };
    let reply = client.tokenize(request).await.unwrap().into_inner();
    assert_eq!(reply.ids, language().encode_ordinary(&long).unwrap());
    assert_eq!(reply.pieces.concat(), long.as_bytes());
    assert_eq!(reply.context_max, 4096);
    let models = client.list_models(proto::v1::ListModelsRequest {}).await.unwrap().into_inner();
    assert_eq!((models.models[0].id.as_str(), models.models[0].workers), (MODEL, 1));
}

#[tokio::test]
async fn tokens_after_a_stop_are_neither_told_nor_counted() {
    let cluster = Cluster::one().await;
    cluster.worker().together.store(usize::MAX, std::sync::atomic::Ordering::SeqCst);
    let sampling = Sampling { stop: vec!["ello".into()], ..Sampling::default() };
    let request = generate(Prompt::Text("x".into()), sampling);
    let chunks = cluster.grpc().await.generate(request).await.unwrap();
    let chunks = collect(chunks.into_inner()).await;
    assert_eq!(text(&chunks), "H");
    let usage = chunks.last().unwrap().usage.unwrap();
    let told = chunks.iter().map(|chunk| chunk.tokens.len()).sum::<usize>();
    let all = language().encode_ordinary("Hello").unwrap().len();
    assert!(told <= all && usage.completion_tokens as usize <= all, "{told}, {usage:?}");
}

#[tokio::test]
async fn a_chat_goes_on_in_its_last_message() {
    let cluster = Cluster::one().await;
    let message = |role: &str, content: &str| Message {
        role: role.into(),
        content: content.into(),
        ..Message::default()
    };
    let request = ChatRequest {
        model: MODEL.into(),
        messages: vec![message("user", "Where?"), message("assistant", "It is")],
        continue_final_message: true,
        ..ChatRequest::default()
    };
    collect(cluster.grpc().await.chat(request).await.unwrap().into_inner()).await;
    let prompt = cluster.worker().run(0).prompt;
    let bytes: Vec<u8> = prompt.iter().flat_map(|&id| language().piece(id)).collect();
    assert!(bytes.ends_with(b"</think>\n\nIt is"), "{}", String::from_utf8_lossy(&bytes));
}

#[tokio::test]
async fn what_is_invalid_is_refused_with_its_name() {
    let cluster = Cluster::one().await;
    let mut client = cluster.grpc().await;
    let nan = Sampling { temperature: Some(f32::NAN), ..Sampling::default() };
    let text = || Prompt::Text("x".into());
    let cases = [
        (generate(text(), nan), Code::InvalidArgument, "temperature"),
        (
            GenerateRequest { prompt: None, ..generate(text(), Sampling::default()) },
            Code::InvalidArgument,
            "prompt",
        ),
        (
            generate(Prompt::Ids(TokenIds { ids: vec![] }), Sampling::default()),
            Code::InvalidArgument,
            "prompt",
        ),
        (
            generate(Prompt::Ids(TokenIds { ids: vec![0; 4096] }), Sampling::default()),
            Code::InvalidArgument,
            "4096",
        ),
        (
            GenerateRequest { model: "nobody".into(), ..generate(text(), Sampling::default()) },
            Code::NotFound,
            "nobody",
        ),
    ];
    for (request, code, word) in cases {
        let status = client.generate(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(word), "{status}");
    }
    let chat = |role: &str, args: &str| ChatRequest {
        model: MODEL.into(),
        messages: vec![Message { role: role.into(), ..Message::default() }],
        template_args_json: args.into(),
        ..ChatRequest::default()
    };
    for (request, word) in [(chat("robot", ""), "robot"), (chat("user", "["), "template_args_json")]
    {
        let status = client.chat(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(word), "{status}");
    }
    let huge = generate(Prompt::Text("x".repeat(100_000)), Sampling::default());
    let code = client.generate(huge).await.unwrap_err().code();
    assert!([Code::OutOfRange, Code::ResourceExhausted].contains(&code), "{code:?}");
}

#[tokio::test]
async fn overload_advises_when_to_try_again() {
    let mut config = config();
    config.deadlines.queue = Duration::from_millis(100);
    let cluster = Cluster::start(config, 1).await;
    cluster.worker().places.store(0, std::sync::atomic::Ordering::SeqCst);
    let request = generate(Prompt::Text("x".into()), Sampling::default());
    let status = cluster.grpc().await.generate(request).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    for name in ["grpc-retry-pushback-ms", "retry-after-ms"] {
        let advice = status.metadata().get(name).unwrap().to_str().unwrap();
        assert!(advice.parse::<u64>().unwrap() >= 1000, "{name}: {advice}");
    }
}

#[tokio::test]
async fn health_follows_the_roster_and_the_drain() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let mut cluster = Cluster::start(config(), 0).await;
    let mut client = HealthClient::new(channel(&cluster).await);
    let request = HealthCheckRequest { service: "lockstep.v1.Inference".into() };
    let mut watch = client.watch(request).await.unwrap().into_inner();
    let not_serving = watch.next().await.unwrap().unwrap().status;
    assert_eq!(not_serving, 2);
    cluster.join(cluster::State::Ready).await;
    assert_eq!(watch.next().await.unwrap().unwrap().status, 1);
    cluster.shutdown.send_replace(true);
    assert_eq!(watch.next().await.unwrap().unwrap().status, 2);
    tokio::time::timeout(Duration::from_secs(3), cluster.router.join()).await.expect("the end");
}

#[tokio::test]
async fn reflection_speaks_both_versions() {
    use tonic_reflection::pb::{v1, v1alpha};
    let cluster = Cluster::start(config(), 0).await;

    let ask = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(
            String::new(),
        )),
    };
    let mut client =
        v1::server_reflection_client::ServerReflectionClient::new(channel(&cluster).await);
    let replies = client.server_reflection_info(tokio_stream::once(ask)).await.unwrap();
    let reply = replies.into_inner().next().await.unwrap().unwrap().message_response.unwrap();
    let v1::server_reflection_response::MessageResponse::ListServicesResponse(list) = reply else {
        panic!("{reply:?}");
    };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"lockstep.v1.Inference"), "{names:?}");
    assert!(names.contains(&"grpc.health.v1.Health"), "{names:?}");
    assert!(!names.contains(&"lockstep.v1.Worker"), "{names:?}");

    let symbol = "lockstep.v1.Inference.Chat".to_owned();
    let ask = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(
            v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(symbol),
        ),
    };
    let mut client =
        v1alpha::server_reflection_client::ServerReflectionClient::new(channel(&cluster).await);
    let replies = client.server_reflection_info(tokio_stream::once(ask)).await.unwrap();
    let reply = replies.into_inner().next().await.unwrap().unwrap().message_response.unwrap();
    let v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(files) = reply
    else {
        panic!("{reply:?}");
    };
    assert!(!files.file_descriptor_proto.is_empty());
}

/// `lockstep run` says the same: it asks the same function.
#[tokio::test]
async fn both_apis_refuse_a_value_in_the_same_words() {
    let cluster = Cluster::one().await;
    let mut client = cluster.grpc().await;
    let http = cluster.http();
    type Change = fn(&mut Sampling);
    let table: [(Value, Change, &str); 12] = [
        (json!(2.5), |s| s.temperature = Some(2.5), "temperature must be in [0, 2], not 2.5"),
        (json!(-1), |s| s.temperature = Some(-1.0), "temperature must be in [0, 2], not -1"),
        (json!(1.5), |s| s.top_p = Some(1.5), "top_p must be in (0, 1], not 1.5"),
        (json!(-0.5), |s| s.min_p = Some(-0.5), "min_p must be in [0, 1], not -0.5"),
        (
            json!(0),
            |s| s.repetition_penalty = Some(0.0),
            "repetition_penalty must be in (0, 100], not 0",
        ),
        (
            json!(-3),
            |s| s.presence_penalty = Some(-3.0),
            "presence_penalty must be in [-2, 2], not -3",
        ),
        (
            json!(2.5),
            |s| s.frequency_penalty = Some(2.5),
            "frequency_penalty must be in [-2, 2], not 2.5",
        ),
        (json!(21), |s| s.logprobs = Some(21), "logprobs must be in [0, 20], not 21"),
        (
            json!({"7": 101}),
            |s| s.logit_bias = HashMap::from([(7, 101.0)]),
            "logit_bias must be in [-100, 100], not 101",
        ),
        (
            json!({"512": 1}),
            |s| s.logit_bias = HashMap::from([(512, 1.0)]),
            "logit_bias: token id 512 does not exist; ids are below 512",
        ),
        (
            json!([600]),
            |s| s.stop_token_ids = vec![600],
            "stop_token_ids: token id 600 does not exist; ids are below 512",
        ),
        (
            json!(vec![1; 257]),
            |s| s.stop_token_ids = vec![1; 257],
            "stop_token_ids must be at most 256 token ids, not 257",
        ),
    ];
    for (value, change, message) in table {
        let name = message.split([' ', ':']).next().unwrap();
        let body = json!({"model": MODEL, "prompt": "x", name: value});
        let said = http.post("/v1/completions", &body).await.refusal(400, Some(name));
        assert_eq!(said, message);
        let mut sampling = Sampling::default();
        change(&mut sampling);
        let request = generate(Prompt::Text("x".into()), sampling);
        let status = client.generate(request).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, message));
    }
}
