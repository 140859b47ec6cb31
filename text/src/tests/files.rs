//! Languages made of small files: every form that a tokenizer comes in, and what is refused.

use serde_json::{Value, json};

use super::vocabulary::{QWEN25, QWEN25_GGUF, gguf, golden};
use crate::{Chat, Content, Files, Language, Message, TextError};

const FOLDER: &str = "public/qwen2_gqa4_tied_sharded";
const TEXTS: [&str; 5] = ["", "the model said: hello", "a1 23\n\n x", "café 漢字 🙂", "<|im_end|>"];

fn folder(names: &[&str]) -> Files {
    let file = |name: &&str| ((*name).to_owned(), golden(&format!("{FOLDER}/{name}")));
    names.iter().map(file).collect()
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
        let ids = json.encode_literal(text).unwrap();
        assert!(ids.iter().all(|&id| !json.is_special(id)), "{text:?}");
        assert_eq!(pair.encode_literal(text).unwrap(), ids, "{text:?}");
        assert_eq!(gguf.encode_literal(text).unwrap(), ids, "{text:?}");
        assert_eq!(gguf.encode(text).unwrap(), json.encode(text).unwrap(), "{text:?}");
        assert_eq!(pair.encode(text).unwrap(), json.encode(text).unwrap(), "{text:?}");
    }
    for id in 0..json.vocab_size() as u32 {
        assert_eq!(pair.piece(id), json.piece(id));
        assert_eq!(gguf.piece(id), json.piece(id));
        assert_eq!(gguf.is_special(id), json.is_special(id));
    }
    assert_eq!(gguf.defaults().eos_ids, json.defaults().eos_ids);
    assert_eq!(json.piece(1 << 30), b"");
}

/// The published prompts for filling in the middle and for ChatML are templates that clients fill
/// in by themselves, whatever file the vocabulary came in and however it marks the tokens.
#[test]
fn every_added_token_is_parsed_in_a_raw_prompt() {
    let fim = "<|fim_prefix|>def add(a, b):\n    <|fim_suffix|>\n    return total\n<|fim_middle|>";
    let chatml = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n\
        <|im_start|>user\nHello there!<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(QWEN25.encode(fim).unwrap().len(), 15);
    assert_eq!(QWEN25.encode(fim).unwrap(), QWEN25_GGUF.encode(fim).unwrap());
    let ids = QWEN25.encode(chatml).unwrap();
    assert_eq!((ids.len(), ids[0], ids[1]), (22, 151_644, 8948));
    assert_eq!(ids, QWEN25_GGUF.encode(chatml).unwrap());
    let tools = "<tool_call>\n{}\n</tool_call>";
    assert_eq!(QWEN25.encode(tools).unwrap(), [151_657, 198, 16094, 151_658]);
    for language in [&*QWEN25, &*QWEN25_GGUF] {
        for text in [fim, chatml, tools] {
            let ids = language.encode_literal(text).unwrap();
            assert!(ids.iter().all(|&id| id < 151_643), "{text:?}");
        }
        assert_eq!(language.special_token("<|file_sep|>"), Some(151_664));
        assert_eq!(language.special_token("<tool_call>"), Some(151_657));
        assert_eq!(language.special_token("<|file_sep|> "), None);
        assert_eq!(language.special_token("hello"), None);
    }
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
    let mut with_call = conversation();
    with_call.messages.push(Message {
        content: Content::Null,
        tool_calls: Some(json!([{"function": {"name": "f", "arguments": ""}}])),
        ..Message::new("assistant", "")
    });
    assert!(matches!(language.encode_chat(&with_call), Err(TextError::Refused(_))));
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
    let bare = language.encode_bare("hi<|im_end|>").unwrap();
    assert_eq!(language.encode("hi<|im_end|>").unwrap(), [&[480], &bare[..]].concat());
    assert_eq!(*bare.last().unwrap(), 482);
    let literal = language.encode_ordinary("hi<|im_end|>").unwrap();
    assert_eq!(language.encode_literal("hi<|im_end|>").unwrap(), [&[480], &literal[..]].concat());
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
fn templates_in_files_of_their_own_come_before_the_configurations() {
    let mut files = folder(&["tokenizer.json"]);
    let mut put = |name: &str, text: &str| files.insert(name.to_owned(), text.into());
    put("tokenizer_config.json", r#"{"chat_template": "config"}"#);
    put("additional_chat_templates/tool_use.jinja", "tools");
    put("additional_chat_templates/rag.jinja", "{% if");
    let with_tools = Chat { tools: Some(json!([])), ..conversation() };
    let language = Language::load(&files).unwrap();
    assert_eq!(language.render_chat(&conversation()).unwrap(), "config");
    assert_eq!(language.render_chat(&with_tools).unwrap(), "tools");
    files.insert("chat_template.jinja".to_owned(), "\u{feff}file\r\n{# #}\r\n".into());
    let language = Language::load(&files).unwrap();
    assert_eq!(language.render_chat(&conversation()).unwrap(), "file\n");
    assert_eq!(language.render_chat(&with_tools).unwrap(), "tools");
    assert!(language.warnings().is_empty());
}

#[test]
fn a_broken_template_refuses_chat_alone() {
    let mut files = folder(&["tokenizer.json"]);
    files.insert("chat_template.jinja".to_owned(), b"{% if x %}{{ y".to_vec());
    let language = Language::load(&files).unwrap();
    assert!(!language.encode("hello").unwrap().is_empty());
    let error = language.encode_chat(&conversation()).unwrap_err();
    assert!(matches!(error, TextError::BrokenTemplate(_)), "{error}");
    let warnings = language.warnings();
    assert_eq!(warnings.len(), 1);
    for text in [error.to_string(), warnings[0].clone()] {
        assert!(text.contains("chat_template.jinja: ") && text.contains("syntax error"), "{text}");
    }
    // One for tools that is broken refuses only conversations with tools.
    files.insert("chat_template.jinja".to_owned(), b"plain".to_vec());
    files.insert("additional_chat_templates/tool_use.jinja".to_owned(), b"{{".to_vec());
    let language = Language::load(&files).unwrap();
    assert_eq!(language.render_chat(&conversation()).unwrap(), "plain");
    let with_tools = Chat { tools: Some(json!([])), ..conversation() };
    let error = language.render_chat(&with_tools).unwrap_err().to_string();
    assert!(error.contains("tool_use.jinja"), "{error}");
    assert_eq!(language.warnings().len(), 1);
}

/// The oldest layout: added tokens in a file of their own, special ones named in another.
#[test]
fn older_folders_name_their_added_tokens_in_files_of_their_own() {
    let whole = Language::load(&folder(&["tokenizer.json", "tokenizer_config.json"])).unwrap();
    let config = golden(&format!("{FOLDER}/tokenizer_config.json"));
    let config: Value = serde_json::from_slice(&config).unwrap();
    let decoder = config["added_tokens_decoder"].as_object().unwrap();
    let added = decoder.iter().map(|(id, token)| {
        let id: u64 = id.parse().unwrap();
        (token["content"].as_str().unwrap().to_owned(), json!(id))
    });
    let added: serde_json::Map<String, Value> = added.collect();
    let mut files = folder(&["vocab.json", "merges.txt"]);
    let mut put = |name: &str, json: &Value| {
        files.insert(name.to_owned(), json.to_string().into_bytes());
    };
    put("added_tokens.json", &Value::Object(added));
    put(
        "special_tokens_map.json",
        &json!({"eos_token": {"content": "<|im_end|>"},
        "additional_special_tokens": ["<|im_start|>"], "pad_token": "<|endoftext|>"}),
    );
    let language = Language::load(&files).unwrap();
    assert_eq!(language.vocab_size(), whole.vocab_size());
    for text in TEXTS.iter().chain(&["<tool_call>\n{}</tool_call>", "<|im_start|>x<|endoftext|>"]) {
        assert_eq!(language.encode(text).unwrap(), whole.encode(text).unwrap(), "{text:?}");
    }
    for id in 0..whole.vocab_size() as u32 {
        assert_eq!(language.piece(id), whole.piece(id));
        // These files do not say of names between bars that they are not special.
        let bars = whole.piece(id).starts_with(b"<|") && whole.piece(id).ends_with(b"|>");
        assert_eq!(language.is_special(id), whole.is_special(id) || bars, "{id}");
    }
    // A special token without an id follows all others; one in the vocabulary keeps its own.
    let mut put = |name: &str, json: &Value| {
        files.insert(name.to_owned(), json.to_string().into_bytes());
    };
    put("special_tokens_map.json", &json!({"eos_token": "a", "pad_token": "<pad>"}));
    let language = Language::load(&files).unwrap();
    let last = whole.vocab_size() as u32;
    assert_eq!(language.encode("<pad>a").unwrap()[0], last);
    assert_eq!(language.special_token("<pad>"), Some(last));
    assert!(language.is_special(*language.encode("a").unwrap().first().unwrap()));
}

#[test]
fn a_model_without_a_tokenizer_takes_ids_only() {
    let language = Language::load(&folder(&["config.json", "generation_config.json"])).unwrap();
    assert!(matches!(language.encode("x"), Err(TextError::NoTokenizer)));
    assert!(matches!(language.encode_chat(&conversation()), Err(TextError::NoTokenizer)));
    assert_eq!((language.vocab_size(), language.decoder().push(1)), (0, String::new()));
    assert_eq!(language.defaults().eos_ids, [480, 482]);
    assert_eq!(language.defaults().params.top_k, 20);
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
        (with("tokenizer.json", b"\xef\xbb\xbf{}"), "tokenizer.json: begins with a byte order"),
        (with("config.json", b"\xef\xbb\xbf{}"), "config.json: begins with a byte order mark"),
        (with("config.json", b"{\"eos_token_id\": NaN}"), "config.json: NaN in line 1"),
        (with("special_tokens_map.json", b"{"), "special_tokens_map.json"),
        (with("added_tokens.json", b"[]x"), "added_tokens.json"),
        (with("chat_template.jinja", b"\xff"), "chat_template.jinja"),
        (with("generation_config.json", b"{\"top_k\": 50.5}"), "top_k is 50.5, not a whole"),
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
