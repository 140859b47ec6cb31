//! Checkpoints in memory, to be changed and opened.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use collective::{Staged, Threads};
use kernels::plain::Plain;
use model::{Checkpoint, ModelError, Runner, RunnerOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The folder of a stored case.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public").join(name)
}

/// A checkpoint in memory, to be damaged.
pub struct Files {
    pub config: Value,
    /// Dtype, shape and bytes by name.
    pub tensors: BTreeMap<String, (String, Vec<u64>, Vec<u8>)>,
}

impl Files {
    /// A stored case's.
    pub fn of(name: &str) -> Self {
        let config = fs::read(golden(name).join("config.json")).unwrap();
        let file = fs::read(golden(name).join("model.safetensors")).unwrap();
        let parsed = formats::safetensors::parse(&file).unwrap();
        let tensors = parsed.into_iter().map(|tensor| {
            let bytes = file[tensor.offset as usize..][..tensor.bytes as usize].to_vec();
            (tensor.name, (tensor.dtype.name.to_owned(), tensor.shape, bytes))
        });
        Self { config: serde_json::from_slice(&config).unwrap(), tensors: tensors.collect() }
    }

    /// A folder of it on disk.
    pub fn write(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, (dtype, shape, bytes)) in &self.tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
            header.insert(name.clone(), entry);
            data.extend_from_slice(bytes);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let file = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
        fs::write(folder.path().join("model.safetensors"), file).unwrap();
        fs::write(folder.path().join("config.json"), self.config.to_string()).unwrap();
        folder
    }

    /// What opening and loading says, and how many bytes of weights had been taken by then.
    pub fn outcome(&self) -> Result<(), (String, u64)> {
        const OPTIONS: RunnerOptions =
            RunnerOptions { blocks: 1, step_tokens_max: 1, sequences_max: 1, context_max: 16 };
        let folder = self.write();
        let mut taken = 0;
        let mut load = || -> Result<(), ModelError> {
            let checkpoint = Checkpoint::open(folder.path())?;
            let alone = Staged::new(Threads::group(1).remove(0));
            Runner::load(Plain, alone, &checkpoint, OPTIONS, &mut |loaded| {
                taken = loaded.uploaded
            })?;
            Ok(())
        };
        load().map_err(|error| (error.to_string(), taken))
    }

    /// Refused with this in the message, before any memory is taken.
    #[track_caller]
    pub fn refused(&self, named: &str) {
        let (error, taken) = self.outcome().expect_err("refused");
        assert!(error.contains(named), "{error}");
        assert_eq!(taken, 0, "bytes were loaded before: {error}");
    }
}
