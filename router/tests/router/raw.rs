//! Raw text: a template of the client's own, read by both APIs alike.

use crate::{
    Cluster, MODEL,
    grpc::{collect, generate},
    shapes::{CHAT, COMPLETIONS, answered, chat, completion, with},
    worker::language,
};
use proto::v1::{
    DetokenizeRequest, GenerateRequest, Sampling, TokenizeRequest, generate_request::Prompt,
};
use serde_json::json;
use tonic::Code;

const START: u32 = 481;
const END: u32 = 482;

#[tokio::test]
async fn a_raw_prompt_is_the_callers_own_template_unless_taken_literally() {
    let cluster = Cluster::one().await;
    let (prompt, model) = ("<|im_start|>user\nHi<|im_end|>", language());
    for (extra, ids) in [
        (json!({}), model.encode(prompt)),
        (json!({"parse_special": true, "add_special_tokens": true}), model.encode(prompt)),
        (json!({"add_special_tokens": false}), model.encode_bare(prompt)),
        (json!({"parse_special": false}), model.encode_literal(prompt)),
        (
            json!({"parse_special": false, "add_special_tokens": false}),
            model.encode_ordinary(prompt),
        ),
    ] {
        let body = completion(with(json!({"prompt": prompt}), &extra));
        answered(&cluster, COMPLETIONS, &body).await;
        let run = cluster.worker().runs.lock().unwrap().pop().unwrap().0;
        assert_eq!(run.prompt, ids.unwrap(), "{extra}");
    }
    let specials = |ids: &[u32]| ids.iter().filter(|&&id| id == START || id == END).count();
    assert_eq!(specials(&model.encode_bare(prompt).unwrap()), 2);
    assert_eq!(specials(&model.encode_literal(prompt).unwrap()), 0);
}

#[tokio::test]
async fn text_and_ids_are_turned_into_each_other() {
    let cluster = Cluster::one().await;
    let http = cluster.http();
    let text = "<|im_start|>wörld";
    let ids = language().encode_bare(text).unwrap();
    let body = json!({"model": MODEL, "prompt": text, "add_special_tokens": false,
        "return_token_strs": true});
    let reply = answered(&cluster, "/tokenize", &body).await;
    assert_eq!(reply["tokens"], json!(ids));
    assert_eq!((&reply["count"], &reply["max_model_len"]), (&json!(ids.len()), &json!(4096)));
    assert_eq!(reply["token_strs"][0], "<|im_start|>");
    let literal = json!({"model": MODEL, "prompt": text, "parse_special": false});
    let reply = answered(&cluster, "/tokenize", &literal).await;
    assert_eq!(reply["tokens"], json!(language().encode_literal(text).unwrap()));
    assert!(reply["token_strs"].is_null());

    let reply = answered(&cluster, "/detokenize", &json!({"model": MODEL, "tokens": ids})).await;
    assert_eq!(reply, json!({"prompt": text}));

    let ask = chat(json!({"add_special_tokens": false}));
    let reply = answered(&cluster, "/tokenize", &ask).await;
    answered(&cluster, CHAT, &chat(json!({}))).await;
    assert_eq!(reply["tokens"], json!(cluster.worker().run(0).prompt));

    let unknown = json!({"model": MODEL, "tokens": [512]});
    http.post("/detokenize", &unknown).await.refusal(400, Some("tokens"));
    http.post("/tokenize", &json!({"model": MODEL})).await.refusal(400, Some("prompt"));
    http.post("/tokenize", &json!({"model": "no", "prompt": ""})).await.refusal(404, Some("model"));
    let version = http.get("/version").await.json();
    assert_eq!(version, json!({"version": env!("CARGO_PKG_VERSION")}));
}

#[tokio::test]
async fn raw_text_is_parsed_or_taken_literally_and_read_back() {
    let cluster = Cluster::one().await;
    let mut client = cluster.grpc().await;
    let raw = "<|im_start|>user\nHi";
    for (parse_special, ids) in [
        (None, language().encode_bare(raw).unwrap()),
        (Some(true), language().encode_bare(raw).unwrap()),
        (Some(false), language().encode_ordinary(raw).unwrap()),
    ] {
        let request = TokenizeRequest {
            model: MODEL.into(),
            text: raw.into(),
            add_special_tokens: false,
            parse_special,
        };
        let reply = client.tokenize(request).await.unwrap().into_inner();
        assert_eq!(reply.ids, ids);
        let request = DetokenizeRequest { model: MODEL.into(), ids: ids.clone() };
        assert_eq!(client.detokenize(request).await.unwrap().into_inner().text, raw);
        let prompt = Prompt::Text(raw.into());
        let request = GenerateRequest { parse_special, ..generate(prompt, Sampling::default()) };
        collect(client.generate(request).await.unwrap().into_inner()).await;
        let sent = cluster.worker().runs.lock().unwrap().pop().unwrap().0.prompt;
        let whole = match parse_special {
            Some(false) => language().encode_literal(raw),
            _ => language().encode(raw),
        };
        assert_eq!(sent, whole.unwrap());
    }
    let request = DetokenizeRequest { model: MODEL.into(), ids: vec![512] };
    let status = client.detokenize(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().contains("ids"), "{status}");
}
