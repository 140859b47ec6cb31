//! One streamed completion over gRPC, asked for in the words of the HTTP interface.

use proto::v1::{
    GenerateRequest, GenerateResponse, Sampling, generate_request::Prompt,
    inference_client::InferenceClient,
};
use serde_json::{Value, json};
use tokio::{runtime, time::timeout};
use tonic::Request;

use super::{DEADLINE, Reader};

pub fn read(reader: &mut Reader, router: &str, id: &str, body: &Value) {
    let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let pulse = reader.pulse.clone();
    let read = runtime.block_on(async {
        tokio::select! {
            read = timeout(DEADLINE, ask(reader, router, id, body)) => {
                read.unwrap_or_else(|_| Err(format!("no end within {DEADLINE:?}")))
            }
            () = pulse.leave.notified() => Err("the client left".to_owned()),
        }
    });
    if let Err(error) = read {
        reader.failed(error);
    }
}

async fn ask(reader: &mut Reader, router: &str, id: &str, body: &Value) -> Result<(), String> {
    let connected = InferenceClient::connect(format!("http://{router}")).await;
    let mut client = connected.map_err(|error| format!("connecting: {error}"))?;
    let mut request = Request::new(message(body));
    request.metadata_mut().insert("x-request-id", id.parse().expect("a header's value"));
    let answer = client.generate(request).await.map_err(|status| status.to_string())?;
    reader.accepted();
    let mut stream = answer.into_inner();
    while let Some(message) = stream.message().await.map_err(|status| status.to_string())? {
        take(reader, message);
        reader.heard();
    }
    match reader.answer.usage {
        Some(_) => Ok(()),
        None => Err("the stream ended without its last message".to_owned()),
    }
}

/// The request as gRPC has it.
fn message(body: &Value) -> GenerateRequest {
    let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
    let float = |name: &str| body[name].as_f64().map(|value| value as f32);
    let count =
        |name: &str| body[name].as_u64().map(|value| u32::try_from(value).expect("a small number"));
    let stop = body["stop"].as_array().into_iter().flatten();
    GenerateRequest {
        model: text("model"),
        prompt: Some(Prompt::Text(text("prompt"))),
        sampling: Some(Sampling {
            max_tokens: count("max_tokens"),
            temperature: float("temperature"),
            top_p: float("top_p"),
            presence_penalty: float("presence_penalty"),
            seed: body["seed"].as_u64(),
            n: count("n"),
            logprobs: count("logprobs"),
            stop: stop.map(|stop| stop.as_str().expect("a text").to_owned()).collect(),
            ignore_eos: body["ignore_eos"] == true,
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

fn take(reader: &mut Reader, message: GenerateResponse) {
    let tokens = message.tokens.iter();
    let told = tokens.map(|token| format!("{} {:?} {:?}", token.id, token.logprob, token.top));
    let told: Vec<String> = told.collect();
    let known = reader.choice(message.choice.into(), told.len());
    known.text += &message.text;
    known.tokens.extend(told);
    if !message.finish_reason.is_empty() {
        known.finish = Some(message.finish_reason);
    }
    if let Some(usage) = message.usage {
        // What was in a cache depends on where it ran.
        let (prompt, completion) = (usage.prompt_tokens, usage.completion_tokens);
        reader.answer.usage =
            Some(json!({"prompt_tokens": prompt, "completion_tokens": completion}));
    }
}
