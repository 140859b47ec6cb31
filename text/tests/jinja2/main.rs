//! Chat templates rendered here and by Python's jinja2 as Hugging Face sets it up: the published
//! templates of the Qwen family over generated conversations, and what templates may call.

mod conversations;
mod expressions;

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use text::{Chat, Files, Language, TextError};

/// What a template made of a conversation.
#[derive(Debug, PartialEq)]
enum Outcome {
    Text(String),
    /// With the template's own words where it refused.
    Refused(Option<String>),
}

const CONVERSATIONS: usize = 250;

#[test]
fn published_templates_render_as_in_python() {
    let templates = templates();
    assert!(templates.len() >= 11, "{:?}", templates.keys());
    let conversations = conversations::generate(CONVERSATIONS);
    let mut cases = Vec::new();
    for name in templates.keys() {
        cases.extend((0..conversations.len()).map(|at| (name, at)));
    }
    assert!(cases.len() >= 2000);
    let asked = json!({"templates": templates, "conversations": conversations, "cases": cases,
        "expressions": []});
    let Some(answer) = python(&asked) else { return };
    let languages: BTreeMap<&String, Language> =
        templates.iter().map(|(name, source)| (name, language(source))).collect();
    let chats: Vec<Chat> = conversations.iter().map(conversations::chat).collect();
    let (mut same, mut refused, mut differ) = (0, 0, Vec::new());
    for ((name, at), theirs) in cases.iter().zip(answer["renderings"].as_array().unwrap()) {
        let (ours, theirs) = (outcome(languages[name].render_chat(&chats[*at])), read(theirs));
        match (&ours, &theirs) {
            _ if ours != theirs => differ.push((name, &conversations[*at], ours, theirs)),
            (Outcome::Text(_), _) => same += 1,
            (Outcome::Refused(_), _) => refused += 1,
        }
    }
    eprintln!("{same} equal texts, {refused} equal refusals, {} differences", differ.len());
    assert!(differ.is_empty(), "{} of {}: {:#?}", differ.len(), cases.len(), &differ[0]);
    assert!(same >= 2000, "{same} texts and {refused} refusals compare too little");
}

#[test]
fn what_templates_may_call_works_as_in_python() {
    let sources: Vec<&str> = expressions::SAME.to_vec();
    let known = expressions::DIFFERENT.map(|(source, _)| source);
    let all: Vec<String> =
        sources.iter().chain(&known).map(|source| format!("{{{{ {source} }}}}")).collect();
    let asked =
        json!({"templates": {}, "conversations": [], "cases": [], "expressions": all.clone()});
    let Some(answer) = python(&asked) else { return };
    let mut chat = Chat::default();
    chat.args.insert("none_value".to_owned(), Value::Null);
    chat.args.insert("a_list".to_owned(), json!([3, 1, 2]));
    let mut wrong = Vec::new();
    for (at, (source, theirs)) in
        all.iter().zip(answer["expressions"].as_array().unwrap()).enumerate()
    {
        let (ours, theirs) = (outcome(language(source).render_chat(&chat)), read(theirs));
        // A difference that is gone must leave the list.
        if (ours == theirs) != (at < sources.len()) {
            wrong.push((source, ours, theirs));
        }
    }
    assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), all.len());
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/chat/templates")
}

fn templates() -> BTreeMap<String, String> {
    let entries = fs::read_dir(goldens()).unwrap().map(|entry| entry.unwrap().path());
    let templates = entries.filter(|path| path.extension().is_some_and(|end| end == "jinja"));
    let name = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_owned();
    templates.map(|path| (name(&path), fs::read_to_string(&path).unwrap())).collect()
}

fn language(template: &str) -> Language {
    let files = Files::from([
        ("chat_template.jinja".to_owned(), template.into()),
        ("tokenizer_config.json".to_owned(), br#"{"bos_token": "<BOS>"}"#.to_vec()),
    ]);
    Language::load(&files).unwrap()
}

fn outcome(rendered: Result<String, TextError>) -> Outcome {
    match rendered {
        Ok(text) => Outcome::Text(text),
        Err(TextError::Refused(words)) => Outcome::Refused(Some(words)),
        Err(_) => Outcome::Refused(None),
    }
}

fn read(theirs: &Value) -> Outcome {
    match (theirs["text"].as_str(), theirs["error"].as_str()) {
        (Some(text), _) => Outcome::Text(text.to_owned()),
        (_, Some(error)) => Outcome::Refused(error.strip_prefix("raised: ").map(str::to_owned)),
        _ => panic!("no answer: {theirs}"),
    }
}

/// The script's answer; `None` without the packages it needs.
fn python(asked: &Value) -> Option<Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let python = root.join(".venv/bin/python");
    if !python.exists() {
        let want = format!("no {}; `./dev test` makes it and runs this", python.display());
        assert!(std::env::var_os("LOCKSTEP_TEST_WHOLE").is_none(), "{want}");
        eprintln!("SKIPPED: {want}");
        return None;
    }
    // The questions go through a file: neither side waits for the other's pipe.
    let mut questions = tempfile::tempfile().unwrap();
    questions.write_all(asked.to_string().as_bytes()).unwrap();
    std::io::Seek::rewind(&mut questions).unwrap();
    let output = Command::new(python)
        .arg(root.join("tests/python/chat_templates.py"))
        .stdin(Stdio::from(questions))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(serde_json::from_slice(&output.stdout).unwrap())
}
