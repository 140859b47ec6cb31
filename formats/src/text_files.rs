//! What a tokenizer needs of a model's files.

use std::{collections::BTreeMap, fs::File, io::Read, path::Path};

use crate::{
    FormatError, Layout, gguf,
    locate::{list, locate},
};

/// Larger files of these kinds are refused.
pub const TEXT_FILE_BYTES_MAX: u64 = 64 << 20;

const NAMES: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
];

/// A folder inside a model's whose templates are named by their files.
const TEMPLATES: &str = "additional_chat_templates";
const TEMPLATES_MAX: usize = 64;

/// Of a Hugging Face folder, the files that say how it speaks, as far as they are there, with every
/// `*.tiktoken` and every template as `additional_chat_templates/NAME.jinja`; of a GGUF file one
/// entry `metadata.gguf`, the file up to the end of its metadata, for [`gguf::parse_metadata`].
///
/// # Errors
/// No model at `path`, files above [`TEXT_FILE_BYTES_MAX`], and what the system refuses.
pub fn text_files(path: &Path) -> Result<BTreeMap<String, Vec<u8>>, FormatError> {
    // Whether there are weights is for others to ask.
    if path.join("config.json").is_file() {
        return of_folder(path);
    }
    match locate(path)? {
        Layout::Safetensors { folder, .. } => of_folder(&folder),
        Layout::Gguf { files: parts } => {
            let path = &parts[0];
            let file = File::open(path).map_err(|e| FormatError::io(path, e))?;
            let len = file.metadata().map_err(|e| FormatError::io(path, e))?.len();
            let end = gguf::metadata_end(&file, len).map_err(|e| e.at(path))?;
            Ok(BTreeMap::from([("metadata.gguf".into(), read_prefix(path, end)?)]))
        }
    }
}

fn of_folder(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>, FormatError> {
    let mut files = BTreeMap::new();
    let named = NAMES.iter().map(|name| folder.join(name)).filter(|path| path.is_file());
    for path in named.chain(list(folder, "tiktoken")?) {
        files.insert(file_name(&path), read_bounded(&path, TEXT_FILE_BYTES_MAX)?);
    }
    let templates = folder.join(TEMPLATES);
    if templates.is_dir() {
        for path in list(&templates, "jinja")?.into_iter().take(TEMPLATES_MAX) {
            let name = format!("{TEMPLATES}/{}", file_name(&path));
            files.insert(name, read_bounded(&path, TEXT_FILE_BYTES_MAX)?);
        }
    }
    Ok(files)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A whole file, if it has at most `bytes_max`.
pub(crate) fn read_bounded(path: &Path, bytes_max: u64) -> Result<Vec<u8>, FormatError> {
    let len = std::fs::metadata(path).map_err(|e| FormatError::io(path, e))?.len();
    if len > bytes_max {
        let text = format!("{len} bytes, more than the {bytes_max} that such a file may have");
        return Err(FormatError::Malformed(text).at(path));
    }
    read_prefix(path, len)
}

fn read_prefix(path: &Path, len: u64) -> Result<Vec<u8>, FormatError> {
    if len > TEXT_FILE_BYTES_MAX {
        let text = format!("{len} bytes of metadata, more than {TEXT_FILE_BYTES_MAX}");
        return Err(FormatError::Malformed(text).at(path));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| FormatError::io(path, e))?;
    file.take(len).read_to_end(&mut bytes).map_err(|e| FormatError::io(path, e))?;
    Ok(bytes)
}
