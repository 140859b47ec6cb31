//! Finding, opening and reading whole checkpoints on disk.

use std::{fs, path::Path};

use crate::common::{GgufFile, safetensors};
use formats::{Layout, Tensors, gguf, locate, text_files};

const ENTRY: &str = r#"{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#;

fn one(name: &str, data: [u8; 4]) -> Vec<u8> {
    safetensors(format!(r#"{{"{name}":{ENTRY}}}"#), &data)
}

fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    fs::write(folder.join(name), bytes).unwrap();
}

fn message<T>(result: Result<T, formats::FormatError>) -> String {
    result.err().expect("refused").to_string()
}

#[test]
fn a_sharded_checkpoint_is_one() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write(at, "config.json", "{}");
    write(at, "m-1.safetensors", one("a", [1, 2, 3, 4]));
    write(at, "m-2.safetensors", one("b", [5, 6, 7, 8]));
    let index = |b: &str| format!(r#"{{"weight_map":{{"a":"m-1.safetensors","b":"{b}"}}}}"#);
    write(at, "model.safetensors.index.json", index("m-2.safetensors"));
    let (tensors, metadata) = Tensors::open(&locate(at).unwrap()).unwrap();
    assert!(metadata.is_none());
    assert_eq!(tensors.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(tensors.total_bytes(), 8);
    let mut two = [0; 2];
    tensors.read_at("b", 1, &mut two).unwrap();
    assert_eq!(two, [6, 7]);
    assert!(message(tensors.read_at("b", 3, &mut two)).contains("truncated"));
    assert!(message(tensors.read_at("c", 0, &mut two)).contains("no tensor c"));

    write(at, "model.safetensors.index.json", index("m-1.safetensors"));
    assert!(message(Tensors::open(&locate(at).unwrap())).contains("promises tensor b"));
    write(at, "model.safetensors.index.json", index("m-3.safetensors"));
    assert!(message(locate(at)).contains("m-3.safetensors is missing"));
    write(at, "model.safetensors.index.json", index("m-2.safetensors"));
    write(at, "m-2.safetensors", one("a", [5, 6, 7, 8]));
    assert!(message(Tensors::open(&locate(at).unwrap())).contains("in an earlier file too"));
}

#[test]
fn a_folder_must_leave_no_choice() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    assert!(message(locate(at)).contains("neither config.json nor a .gguf file"));
    assert!(message(locate(&at.join("none"))).contains("none"));
    write(at, "a.gguf", GgufFile::new().bytes());
    assert_eq!(locate(at).unwrap(), Layout::Gguf { files: vec![at.join("a.gguf")] });
    write(at, "b.gguf", GgufFile::new().bytes());
    assert!(message(locate(at)).contains("2 .gguf files"));
    write(at, "c.bin", "");
    assert!(message(locate(&at.join("c.bin"))).contains("no .gguf file"));
    write(at, "config.json", "{}");
    assert!(message(locate(at)).contains("0 .safetensors files"));
    write(at, "x.safetensors", one("a", [0; 4]));
    assert!(matches!(locate(at).unwrap(), Layout::Safetensors { .. }));
}

#[test]
fn a_split_gguf_is_read_whole_from_any_part() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let part = |number: u32| {
        let mut file = GgufFile::new();
        file.entry("split.no", 2, &(number as u16).to_le_bytes());
        file.entry("split.count", 2, &2u16.to_le_bytes());
        file.u32("number", number);
        file.tensor(["a", "b"][number as usize], &[1], 24, &[number as u8 + 7]);
        file.bytes()
    };
    write(at, "m-00001-of-00002.gguf", part(0));
    assert!(message(locate(at)).contains("m-00002-of-00002.gguf is missing"));
    write(at, "m-00002-of-00002.gguf", part(1));
    for path in [at.to_owned(), at.join("m-00002-of-00002.gguf")] {
        let (tensors, metadata) = Tensors::open(&locate(&path).unwrap()).unwrap();
        assert_eq!(metadata.unwrap().unsigned("number").unwrap(), Some(0));
        let mut byte = [0];
        tensors.read_at("b", 0, &mut byte).unwrap();
        assert_eq!(byte, [8]);
    }
    write(at, "m-00002-of-00002.gguf", part(0));
    assert!(message(Tensors::open(&locate(at).unwrap())).contains("part 1 of 2 by its metadata"));
}

#[test]
fn text_files_are_what_a_tokenizer_needs() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write(at, "config.json", "{}");
    write(at, "model.safetensors", one("a", [0; 4]));
    write(at, "qwen.tiktoken", "IQ== 0");
    write(at, "generation_config.json", "{}");
    write(at, "secrets.json", "{}");
    write(at, "added_tokens.json", "{}");
    std::fs::create_dir(at.join("additional_chat_templates")).unwrap();
    write(at, "additional_chat_templates/tool_use.jinja", "{{ tools }}");
    write(at, "additional_chat_templates/notes.txt", "");
    let files = text_files(at).unwrap();
    assert_eq!(
        files.keys().collect::<Vec<_>>(),
        [
            "added_tokens.json",
            "additional_chat_templates/tool_use.jinja",
            "config.json",
            "generation_config.json",
            "qwen.tiktoken"
        ]
    );
    assert_eq!(files["qwen.tiktoken"], b"IQ== 0");

    let mut file = GgufFile::new();
    file.strings("tokenizer.ggml.tokens", &["a", "b"]).tensor("a", &[64], 24, &[0; 64]);
    write(at, "m.gguf", file.bytes());
    let files = text_files(&at.join("m.gguf")).unwrap();
    let prefix = &files["metadata.gguf"];
    assert!(prefix.len() < file.bytes().len() - 64);
    let metadata = gguf::parse_metadata(prefix).unwrap();
    assert_eq!(metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap(), ["a", "b"]);
}
