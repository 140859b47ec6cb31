//! Languages made of small files: every form that a tokenizer comes in, and what is refused.

use serde_json::{Value, json};

use super::vocabulary::golden;
use crate::{Chat, Files, Language, Message, TextError, parse_tool_arguments};

const FOLDER: &str = "public/qwen2_gqa4_tied_sharded";
const TEXTS: [&str; 5] = ["", "the model said: hello", "a1 23\n\n x", "café 漢字 🙂", "<|im_end|>"];

fn folder(names: &[&str]) -> Files {
    let file = |name: &&str| ((*name).to_owned(), golden(&format!("{FOLDER}/{name}")));
    names.iter().map(file).collect()
}

/// A GGUF file of metadata alone.
fn gguf(entries: &[(&str, Value)]) -> Vec<u8> {
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend(0u64.to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    for (key, value) in entries {
        text(&mut out, key);
        match value {
            Value::String(value) => {
                out.extend(8u32.to_le_bytes());
                text(&mut out, value);
            }
            Value::Bool(value) => {
                out.extend(7u32.to_le_bytes());
                out.push(u8::from(*value));
            }
            Value::Number(value) => {
                out.extend(4u32.to_le_bytes());
                out.extend((value.as_u64().unwrap() as u32).to_le_bytes());
            }
            Value::Array(items) => {
                out.extend(9u32.to_le_bytes());
                out.extend(if items[0].is_string() { 8u32 } else { 5 }.to_le_bytes());
                out.extend((items.len() as u64).to_le_bytes());
                for item in items {
                    match item.as_str() {
                        Some(item) => text(&mut out, item),
                        None => out.extend((item.as_i64().unwrap() as i32).to_le_bytes()),
                    }
                }
            }
            other => panic!("no GGUF type for {other}"),
        }
    }
    out
}

/// The folder's vocabulary as GGUF metadata, with `changes` on top.
fn metadata(changes: &[(&str, Value)]) -> Files {
    let json: Value = serde_json::from_slice(&golden(&format!("{FOLDER}/tokenizer.json"))).unwrap();
    let mut tokens: Vec<(u64, &str, i32)> = Vec::new();
    for (token, id) in json["model"]["vocab"].as_object().unwrap() {
        tokens.push((id.as_u64().unwrap(), token, 1));
    }
    for token in json["added_tokens"].as_array().unwrap() {
        let kind = if token["special"] == true { 3 } else { 4 };
        tokens.retain(|(id, ..)| token["id"] != *id);
        tokens.push((token["id"].as_u64().unwrap(), token["content"].as_str().unwrap(), kind));
    }
    tokens.sort();
    let merge = |merge: &Value| match merge {
        Value::Array(pair) => {
            format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap())
        }
        line => line.as_str().unwrap().to_owned(),
    };
    let merges = json["model"]["merges"].as_array().unwrap().iter().map(merge);
    let mut entries = vec![
        ("tokenizer.ggml.model", json!("gpt2")),
        ("tokenizer.ggml.pre", json!("qwen2")),
        ("tokenizer.ggml.tokens", tokens.iter().map(|(_, token, _)| *token).collect()),
        ("tokenizer.ggml.token_type", tokens.iter().map(|(.., kind)| *kind).collect()),
        ("tokenizer.ggml.merges", merges.collect()),
        ("tokenizer.ggml.eos_token_id", json!(482)),
    ];
    for (key, value) in changes {
        entries.retain(|(known, _)| known != key);
        entries.push((key, value.clone()));
    }
    Files::from([("metadata.gguf".to_owned(), gguf(&entries))])
}

fn conversation() -> Chat {
    let messages = vec![Message::new("user", "hi <|im_end|>")];
    Chat { messages, add_generation_prompt: true, ..Chat::default() }
}

#[test]
fn every_form_of_one_vocabulary_speaks_the_same() {
    let json = Language::load(&folder(&["tokenizer.json", "tokenizer_config.json"])).unwrap();
    let pair = ["vocab.json", "merges.txt", "tokenizer_config.json"];
    let pair = Language::load(&folder(&pair)).unwrap();
    let gguf = Language::load(&metadata(&[])).unwrap();
    assert!(json.vocab_size() > 480);
    for text in TEXTS {
        let ids = json.encode(text).unwrap();
        assert!(ids.iter().all(|&id| !json.is_special(id)), "{text:?}");
        assert_eq!(pair.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(gguf.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(gguf.encode_trusted(text).unwrap(), json.encode_trusted(text).unwrap());
    }
    for id in 0..json.vocab_size() as u32 {
        assert_eq!(pair.piece(id), json.piece(id));
        assert_eq!(gguf.piece(id), json.piece(id));
        assert_eq!(gguf.is_special(id), json.is_special(id));
    }
    assert_eq!(gguf.defaults().eos_ids, json.defaults().eos_ids);
    assert_eq!(json.piece(1 << 30), b"");
}

#[test]
fn chatml_speaks_for_a_model_without_a_template() {
    let language = Language::load(&metadata(&[])).unwrap();
    let expected = "<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(language.render_chat(&conversation()).unwrap(), expected);
    let ids = language.encode_chat(&conversation()).unwrap();
    assert_eq!(ids.iter().filter(|&&id| language.is_special(id)).count(), 3);
    let with_tools = Chat { tools: Some(json!([{}])), ..conversation() };
    assert!(matches!(language.encode_chat(&with_tools), Err(TextError::Refused(_))));
}

#[test]
fn the_models_own_template_and_bos_are_used() {
    let template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}";
    let language = Language::load(&metadata(&[
        ("tokenizer.chat_template", json!(template)),
        ("tokenizer.ggml.bos_token_id", json!(480)),
        ("tokenizer.ggml.add_bos_token", json!(true)),
    ]));
    let language = language.unwrap();
    assert_eq!(language.render_chat(&conversation()).unwrap(), "<|endoftext|>[hi <|im_end|>]");
    // The template's BOS, and not another one before it.
    let ids = language.encode_chat(&conversation()).unwrap();
    assert_eq!(ids.iter().filter(|&&id| language.is_special(id)).count(), 1);
    assert_eq!(ids[0], 480);
    assert_eq!(language.encode("").unwrap(), [480]);
    assert!(language.encode_ordinary("").unwrap().is_empty());
}

#[test]
fn the_tool_template_is_for_conversations_with_tools() {
    let mut files = folder(&["tokenizer.json"]);
    let config = json!({"chat_template": [
        {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]});
    files.insert("tokenizer_config.json".to_owned(), config.to_string().into_bytes());
    let language = Language::load(&files).unwrap();
    assert_eq!(language.render_chat(&conversation()).unwrap(), "plain");
    let with_tools = Chat { tools: Some(json!([])), ..conversation() };
    assert_eq!(language.render_chat(&with_tools).unwrap(), "tools");
}

#[test]
fn a_model_without_a_tokenizer_takes_ids_only() {
    let language = Language::load(&folder(&["config.json", "generation_config.json"])).unwrap();
    assert!(matches!(language.encode("x"), Err(TextError::NoTokenizer)));
    assert!(matches!(language.encode_chat(&conversation()), Err(TextError::NoTokenizer)));
    assert_eq!((language.vocab_size(), language.decoder().push(1)), (0, String::new()));
    assert_eq!(language.defaults().eos_ids, [480, 482]);
    assert_eq!(language.defaults().top_k, Some(20));
}

#[test]
fn the_small_original_qwen_has_the_specials_its_vocabulary_has_room_for() {
    let read = |name: &str| (name.to_owned(), golden(&format!("public/qwen1_ntk_logn/{name}")));
    let names = ["qwen.tiktoken", "config.json", "generation_config.json", "tokenizer_config.json"];
    let language = Language::load(&names.map(read).into()).unwrap();
    assert_eq!(language.vocab_size(), 512);
    assert_eq!(language.defaults().eos_ids, [480, 481, 482]);
    assert_eq!(language.piece(483), b"<|extra_0|>");
    let mut chat = conversation();
    chat.messages.push(Message::new("tool", "x"));
    let error = language.encode_chat(&chat).unwrap_err();
    assert!(matches!(&error, TextError::Refused(text) if text.contains("tool")), "{error}");
}

#[test]
fn broken_and_foreign_files_are_refused_by_name() {
    let with = |name: &str, bytes: &[u8]| {
        let mut files = folder(&["tokenizer.json"]);
        files.insert(name.to_owned(), bytes.to_vec());
        files
    };
    let foreign = json!({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0},
        "unk_token": "a"}, "added_tokens": [], "decoder": {"type": "Fuse"}});
    let cases = [
        (with("tokenizer.json", b"{"), "tokenizer.json"),
        (with("tokenizer.json", foreign.to_string().as_bytes()), "Fuse"),
        (with("tokenizer_config.json", b"[1"), "tokenizer_config.json"),
        (with("chat_template.jinja", b"{% if"), "template"),
        (with("chat_template.jinja", b"\xff"), "chat_template.jinja"),
        (with("generation_config.json", b"{\"top_p\": 7}"), "top_p"),
        (metadata(&[("tokenizer.ggml.pre", json!("tekken"))]), "tekken"),
        (metadata(&[("tokenizer.ggml.model", json!("llama"))]), "llama"),
        (metadata(&[("tokenizer.ggml.merges", json!(["nospace"]))]), "nospace"),
        (metadata(&[("tokenizer.ggml.merges", json!(["zzz yyy"]))]), "zzz"),
        (metadata(&[("tokenizer.ggml.token_type", json!([1]))]), "token types"),
        (Files::from([("metadata.gguf".to_owned(), b"GGUF".to_vec())]), "metadata.gguf"),
        (Files::from([("x.tiktoken".to_owned(), b"IQ== 1".to_vec())]), "ranks"),
        (Files::from([("x.tiktoken".to_owned(), b"!!! 0".to_vec())]), "base64"),
    ];
    for (files, says) in cases {
        let error = Language::load(&files).unwrap_err().to_string();
        assert!(error.contains(says), "{error:?} does not mention {says:?}");
    }
}

#[test]
fn arguments_that_clients_send_as_text_become_objects() {
    let call = |arguments: Value| json!([{"function": {"name": "f", "arguments": arguments}}]);
    let mut calls = call(json!("{\"b\": 1, \"a\": 2}"));
    parse_tool_arguments(&mut calls);
    assert_eq!(calls.to_string(), call(json!({"b": 1, "a": 2})).to_string());
    for kept in [json!("not json"), json!("[1]"), json!({"a": 1})] {
        let mut calls = call(kept.clone());
        parse_tool_arguments(&mut calls);
        assert_eq!(calls, call(kept));
    }
}
