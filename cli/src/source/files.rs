//! Which files of a repository make a model.

use anyhow::{Result, bail};

/// Whether a name from a hub may become a file of ours: one plain component.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name.len() < 256 && !name.starts_with('.') && !name.contains(['/', '\\'])
}

/// The files to fetch: the one asked for, or weights in safetensors with everything that tells how
/// to read them and how to speak with the model.
///
/// # Errors
/// The file is not there, or the repository holds no weights that can be read.
pub fn choose(all: &[String], wanted: Option<&str>) -> Result<Vec<String>> {
    let plain = || all.iter().filter(|name| is_plain_name(name));
    if let Some(wanted) = wanted {
        if plain().any(|name| name == wanted) {
            return Ok(vec![wanted.to_owned()]);
        }
        let like: Vec<_> = plain().filter(|name| name.ends_with(".gguf")).cloned().collect();
        bail!("no file {wanted:?} in it; files of weights there: {}", or_none(&like));
    }
    if !plain().any(|name| name.ends_with(".safetensors")) {
        let gguf: Vec<_> = plain().filter(|name| name.ends_with(".gguf")).cloned().collect();
        if gguf.is_empty() {
            bail!("it holds no weights in safetensors or GGUF");
        }
        bail!("it holds several GGUF files; say which as org/name:FILE, of: {}", or_none(&gguf));
    }
    let part_of_a_model = |name: &&String| {
        let ending = [".safetensors", ".json", ".jinja", ".tiktoken"];
        ending.iter().any(|end| name.ends_with(end)) || name.as_str() == "merges.txt"
    };
    // Last, so that the first file's folder is the model's.
    let templates = all.iter().filter(|name| is_template(name));
    Ok(plain().filter(part_of_a_model).chain(templates).cloned().collect())
}

/// Whether a name is a chat template in the one folder that models keep further ones in.
fn is_template(name: &str) -> bool {
    let file = name.strip_prefix("additional_chat_templates/");
    file.is_some_and(|file| is_plain_name(file) && file.ends_with(".jinja"))
}

fn or_none(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: &[&str]) -> Vec<String> {
        all.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn a_model_is_its_weights_and_what_explains_them() {
        let all = names(&[
            "README.md",
            "config.json",
            "model-00001-of-00002.safetensors",
            "merges.txt",
            "model-00002-of-00002.safetensors",
            "pytorch_model.bin",
            "modeling_qwen.py",
            "additional_chat_templates/tool_use.jinja",
            "additional_chat_templates/../evil.jinja",
            "additional_chat_templates/notes.md",
            "qwen.tiktoken",
            "sub/model.safetensors",
            "../evil.json",
            ".gitattributes",
        ]);
        let chosen = names(&[
            "config.json",
            "model-00001-of-00002.safetensors",
            "merges.txt",
            "model-00002-of-00002.safetensors",
            "qwen.tiktoken",
            "additional_chat_templates/tool_use.jinja",
        ]);
        assert_eq!(choose(&all, None).unwrap(), chosen);
        assert_eq!(choose(&all, Some("config.json")).unwrap(), ["config.json"]);
        assert!(choose(&all, Some("../evil.json")).is_err());
    }

    #[test]
    fn of_several_gguf_files_one_must_be_named() {
        let all = names(&["a-q4.gguf", "a-q8.gguf"]);
        let error = choose(&all, None).unwrap_err().to_string();
        assert!(error.contains("org/name:FILE") && error.contains("a-q8.gguf"), "{error}");
        let error = choose(&all, Some("b.gguf")).unwrap_err().to_string();
        assert!(error.contains("a-q4.gguf"), "{error}");
        assert!(choose(&names(&["pytorch_model.bin"]), None).is_err());
    }
}
