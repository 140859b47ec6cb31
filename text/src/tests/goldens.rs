//! Cases computed by the reference tokenizers and template engines.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::vocabulary::{QWEN1, QWEN3, QWEN25, golden};
use crate::template::ChatTemplate;
use crate::{Chat, Language, Message};

#[derive(Deserialize)]
struct Encoding {
    text: String,
    qwen1_tiktoken: Vec<u32>,
    qwen1_tiktoken_no_special: Vec<u32>,
    qwen25: Vec<u32>,
    qwen3: Vec<u32>,
    qwen25_decode: String,
    qwen25_decode_skip: String,
}

fn decode(language: &Language, ids: &[u32]) -> String {
    let mut decoder = language.decoder();
    let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
    text += &decoder.finish();
    text
}

#[test]
fn ids_and_texts_are_the_references() {
    let cases: Vec<Encoding> =
        serde_json::from_slice(&golden("tokenizer/tokenizer_goldens.json")).unwrap();
    assert_eq!(cases.len(), 320);
    for case in &cases {
        let text = &case.text;
        assert_eq!(QWEN1.encode_literal(text).unwrap(), case.qwen1_tiktoken_no_special, "{text:?}");
        assert_eq!(QWEN1.encode(text).unwrap(), case.qwen1_tiktoken, "{text:?}");
        assert_eq!(QWEN25.encode(text).unwrap(), case.qwen25, "{text:?}");
        assert_eq!(QWEN3.encode(text).unwrap(), case.qwen3, "{text:?}");
        assert_eq!(decode(&QWEN25, &case.qwen25), case.qwen25_decode_skip, "{text:?}");
        let bytes: Vec<u8> = case.qwen25.iter().flat_map(|&id| QWEN25.piece(id)).collect();
        assert_eq!(String::from_utf8_lossy(&bytes), case.qwen25_decode, "{text:?}");
    }
}

#[derive(Deserialize)]
struct Rendering {
    template: String,
    case: String,
    messages: Vec<Map<String, Value>>,
    tools: Option<Value>,
    add_generation_prompt: bool,
    kwargs: Map<String, Value>,
    rendered: String,
}

fn message(mut fields: Map<String, Value>) -> Message {
    let mut text = |key: &str| fields.remove(key).unwrap().as_str().unwrap().to_owned();
    let (role, content) = (text("role"), text("content").into());
    let mut tool_calls = fields.remove("tool_calls");
    for call in tool_calls.iter_mut().flat_map(|calls| calls.as_array_mut().unwrap()) {
        // The reference was shown text. Here text is parsed once: what leads to it is its JSON.
        if let Some(arguments @ Value::String(_)) = call.pointer_mut("/function/arguments") {
            *arguments = Value::String(arguments.to_string());
        }
    }
    Message { role, content, tool_calls, extra: fields }
}

#[test]
fn templates_render_as_the_reference_does() {
    let cases: Vec<Rendering> =
        serde_json::from_slice(&golden("chat/chat_templates.json")).unwrap();
    assert_eq!(cases.len(), 210);
    for case in cases {
        let source = String::from_utf8(golden(&format!("chat/templates/{}", case.template)));
        let template = ChatTemplate::compile(&source.unwrap(), BTreeMap::new()).unwrap();
        let chat = Chat {
            messages: case.messages.into_iter().map(message).collect(),
            tools: case.tools,
            args: case.kwargs,
            add_generation_prompt: case.add_generation_prompt,
            continue_final_message: false,
        };
        let rendered = template.render(&chat, &str::to_owned).unwrap();
        assert_eq!(rendered, case.rendered, "{} {}", case.template, case.case);
        tokens_say_the_same(&chat, &case.template, &rendered);
    }
}

/// The ids of a rendered chat stand for exactly the rendered text.
fn tokens_say_the_same(chat: &Chat, template: &str, rendered: &str) {
    let language = match template {
        "qwen2.5-7b-instruct.jinja" => &*QWEN25,
        "qwen3-0.6b.jinja" => &*QWEN3,
        _ => return,
    };
    let ids = language.encode_chat(chat).unwrap();
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| language.piece(id)).collect();
    assert_eq!(String::from_utf8_lossy(&bytes), rendered);
    let specials = |text: &str| text.matches("<|im_").count();
    let texts = chat.messages.iter().map(|m| m.content.as_str());
    let written: usize = texts.map(specials).sum();
    let ids = ids.iter().filter(|&&id| language.is_special(id)).count();
    assert!(ids <= specials(rendered) && ids >= specials(rendered) - written);
    assert_eq!(ids % 2, usize::from(chat.add_generation_prompt));
}

#[derive(Deserialize)]
struct Context {
    query: String,
    history: Vec<(String, String)>,
    system: String,
    max_window_size: usize,
    raw_text: String,
    context_tokens: Vec<u32>,
}

#[test]
fn the_original_qwens_contexts_are_the_references() {
    let cases: Vec<Context> =
        serde_json::from_slice(&golden("chat/qwen1_make_context.json")).unwrap();
    assert_eq!(cases.len(), 10);
    for case in cases {
        let mut messages = vec![Message::new("system", &case.system)];
        for (user, assistant) in &case.history {
            messages.push(Message::new("user", user));
            messages.push(Message::new("assistant", assistant));
        }
        messages.push(Message::new("user", &case.query));
        let mut chat = Chat { messages, add_generation_prompt: true, ..Chat::default() };
        chat.args.insert("max_window_size".into(), case.max_window_size.into());
        assert_eq!(QWEN1.render_chat(&chat).unwrap(), case.raw_text);
        assert_eq!(QWEN1.encode_chat(&chat).unwrap(), case.context_tokens);
    }
}
