//! What lies at a model's path.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{FormatError, safetensors::Index, text_files::read_bounded};

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
/// Indexes of the largest checkpoints take less than 1 MB.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// The files of one checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A Hugging Face folder: `config.json` beside the weights.
    Safetensors { folder: PathBuf, files: Vec<PathBuf>, index: Option<Index> },
    /// One file, or all parts of a split one in order.
    Gguf { files: Vec<PathBuf> },
}

/// Finds the checkpoint at `path`: a GGUF file (any part of a split one), a folder with one, or a
/// folder with `config.json` and safetensors. A folder with both is read as the latter.
///
/// # Errors
/// `NotFound` says what was looked for; missing parts are named.
pub fn locate(path: &Path) -> Result<Layout, FormatError> {
    let metadata = fs::metadata(path).map_err(|e| FormatError::io(path, e))?;
    if metadata.is_file() {
        return match has_extension(path, "gguf") {
            true => Ok(Layout::Gguf { files: parts(path)? }),
            false => Err(FormatError::NotFound(format!(
                "{} is no .gguf file; give one, or the folder of a Hugging Face checkpoint",
                path.display()
            ))),
        };
    }
    if path.join(CONFIG).is_file() {
        return safetensors(path);
    }
    let mut files = list(path, "gguf")?;
    files.retain(|file| split_name(file).is_none_or(|(_, number, _)| number == 1));
    match files.as_slice() {
        [file] => Ok(Layout::Gguf { files: parts(file)? }),
        [] => Err(FormatError::NotFound(format!(
            "{} has neither config.json nor a .gguf file",
            path.display()
        ))),
        several => Err(FormatError::NotFound(format!(
            "{} has {} .gguf files; give the path of one",
            path.display(),
            several.len()
        ))),
    }
}

fn safetensors(folder: &Path) -> Result<Layout, FormatError> {
    let at = folder.join(INDEX);
    if at.is_file() {
        let index = Index::parse(&read_bounded(&at, INDEX_BYTES_MAX)?).map_err(|e| e.at(&at))?;
        let files: Vec<_> = index.files().into_iter().map(|file| folder.join(file)).collect();
        if let Some(missing) = files.iter().find(|file| !file.is_file()) {
            return Err(FormatError::NotFound(format!(
                "{} is missing, one of {} files of the checkpoint; download it again",
                missing.display(),
                files.len()
            )));
        }
        return Ok(Layout::Safetensors { folder: folder.into(), files, index: Some(index) });
    }
    let files = list(folder, "safetensors")?;
    let single = folder.join("model.safetensors");
    let file = match files.as_slice() {
        _ if files.contains(&single) => single,
        [file] => file.clone(),
        _ => {
            return Err(FormatError::NotFound(format!(
                "{} has {} .safetensors files and neither {INDEX} nor model.safetensors",
                folder.display(),
                files.len()
            )));
        }
    };
    Ok(Layout::Safetensors { folder: folder.into(), files: vec![file], index: None })
}

fn has_extension(path: &Path, wanted: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(wanted))
}

/// Files of a folder by extension, in order of name.
pub(crate) fn list(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, FormatError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| FormatError::io(folder, e))? {
        let path = entry.map_err(|e| FormatError::io(folder, e))?.path();
        if has_extension(&path, extension) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// `name-00002-of-00005.gguf` as (`name`, 2, 5).
fn split_name(path: &Path) -> Option<(&str, usize, usize)> {
    let (rest, total) = path.file_stem()?.to_str()?.rsplit_once("-of-")?;
    let (name, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| {
        (text.len() == 5).then(|| text.parse::<usize>().ok()).flatten().filter(|n| *n > 0)
    };
    Some((name, digits(number)?, digits(total)?))
}

fn parts(path: &Path) -> Result<Vec<PathBuf>, FormatError> {
    let Some((name, _, total)) = split_name(path) else {
        return Ok(vec![path.to_owned()]);
    };
    let file =
        |number: usize| path.with_file_name(format!("{name}-{number:05}-of-{total:05}.gguf"));
    let files: Vec<_> = (1..=total).map(file).collect();
    match files.iter().find(|file| !file.is_file()) {
        None => Ok(files),
        Some(missing) => Err(FormatError::NotFound(format!(
            "{} is missing, one of {total} parts of the model; download it again",
            missing.display()
        ))),
    }
}
