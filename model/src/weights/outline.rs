//! A model of which there is the configuration alone: what its matrices would be stored as, and
//! numbers from a seed in place of theirs.

use formats::Layout;
use kernels::{Groups, IntegerShape, PartShape, Random, RandomFormat, Stored, WeightPart};
use serde::{Deserialize, Serialize};
use std::{ops::Range, path::Path};

use super::{
    Checkpoint, Source, TensorNames, model_name,
    module::{Cut, Module},
    read_config,
};
use crate::{DecoderConfig, ModelError, config::Quantisation};

/// How the matrices of layers are stored. Tables and what chooses experts are bf16 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Numbers {
    Bf16,
    /// e4m3 with scales.
    Fp8,
    /// Integers of 4 or 8 bits that share a scale by runs of columns; one for all where `None`.
    Integers {
        bits: usize,
        group: Option<usize>,
    },
}

impl Numbers {
    /// As published checkpoints of 4 bits are.
    pub const INT4: Self = Self::Integers { bits: 4, group: Some(128) };

    pub(super) fn of(quantisation: Quantisation) -> Self {
        match quantisation {
            Quantisation::None => Self::Bf16,
            Quantisation::Fp8Blocks { .. } | Quantisation::Fp8 => Self::Fp8,
            Quantisation::Gptq { bits, group, .. } => Self::Integers { bits, group },
            Quantisation::Awq { group } => Self::Integers { bits: 4, group },
        }
    }

    /// How `module` is stored.
    fn of_module(self, module: &Module, names: &TensorNames) -> Self {
        let chooses = [names.experts.router, names.experts.shared_gate];
        let ends =
            |name: &&str| module.stem.strip_suffix(*name).is_some_and(|layer| layer.ends_with('.'));
        let is_chooser = chooses.iter().any(ends);
        let is_table = [names.embed, names.lm_head].contains(&&*module.stem);
        if is_table || is_chooser { Self::Bf16 } else { self }
    }

    /// Bytes of the numbers of a part, without what scales them.
    pub(super) fn bytes(self, module: &Module, cut: &Cut, names: &TensorNames) -> u64 {
        let elements = cut.rows().len() * cut.cols(module).len();
        (match self.of_module(module, names) {
            Self::Bf16 => elements * 2,
            Self::Fp8 => elements,
            Self::Integers { bits, .. } => elements * bits / 8,
        }) as u64
    }

    pub(super) fn shape(self, module: &Module, cut: &Cut, names: &TensorNames) -> PartShape {
        let cols = cut.cols(module);
        let integers = match self.of_module(module, names) {
            Self::Bf16 | Self::Fp8 => None,
            Self::Integers { bits, group } => {
                let size = group.unwrap_or(module.cols);
                let groups = Groups::Runs { size, first: 0 };
                let shape = IntegerShape { bits, groups, count: module.cols.div_ceil(size) };
                Some(shape.columns(&cols))
            }
        };
        PartShape { rows: cut.rows().len(), cols: cols.len(), integers }
    }
}

impl Checkpoint {
    /// A folder's `config.json` alone: sizes of what the model would be, and no numbers to read.
    /// Matrices are stored as its `quantization_config` says, else in bf16.
    ///
    /// # Errors
    /// `Io` where there is no `config.json`; otherwise as [`Self::open`] for what it says.
    pub fn outline(folder: &Path) -> Result<Self, ModelError> {
        let text = read_config(&folder.join("config.json"))?;
        let config = DecoderConfig::from_json(&text)?;
        let numbers = Numbers::of(Quantisation::from_json(&text)?);
        let layout = Layout::Safetensors { folder: folder.into(), files: vec![], index: None };
        let name = model_name(&layout, folder);
        let names = config.family.names;
        Ok(Self { config, name, names, source: Source::Outline(numbers) })
    }

    /// [`Self::outline`] of a folder with a `config.json` and no weights; otherwise [`Self::open`].
    ///
    /// # Errors
    /// Of whichever it is.
    pub fn open_or_outline(path: &Path) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.display().to_string(), source };
        if !path.join("config.json").is_file() {
            return Self::open(path);
        }
        let mut has_weights = path.join("model.safetensors.index.json").is_file();
        for entry in std::fs::read_dir(path).map_err(io)? {
            let extension = entry.map_err(io)?.path().extension().map(|end| end.to_owned());
            has_weights |= extension.is_some_and(|end| end.eq_ignore_ascii_case("safetensors"));
        }
        if has_weights { Self::open(path) } else { Self::outline(path) }
    }

    /// The model of a configuration with numbers that follow from `seed`: a folder needs nothing
    /// but its `config.json`. Matrices are about normal with a deviation of 0.02, norms are ones.
    ///
    /// # Errors
    /// As [`Self::outline`], or [`Self::open`] where there is no such folder.
    pub fn random(path: &Path, numbers: Numbers, seed: u64) -> Result<Self, ModelError> {
        let outline = match path.join("config.json").is_file() {
            true => Self::outline(path)?,
            false => Self::open(path)?.stored_as(numbers),
        };
        Ok(Self { source: Source::Seeded(Seeded { seed, numbers }), ..outline })
    }

    /// The outline of the same model with its matrices stored otherwise.
    pub fn stored_as(&self, numbers: Numbers) -> Self {
        let config = self.config.clone();
        let source = Source::Outline(numbers);
        Self { names: config.family.names, name: self.name.clone(), config, source }
    }
}

/// Numbers that follow from a seed, in place of a checkpoint's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seeded {
    pub seed: u64,
    pub numbers: Numbers,
}

impl Seeded {
    /// Of the whole model, by the matrix.
    fn of(self, stem: &str, index: usize) -> u64 {
        // FNV-1a.
        let bytes = stem.bytes().chain((index as u64).to_le_bytes());
        bytes.fold(self.seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }

    /// # Errors
    /// `Unsupported` for a format that there are no random numbers in.
    pub fn part(
        self,
        module: &Module,
        cut: &Cut,
        names: &TensorNames,
    ) -> Result<WeightPart<'static>, ModelError> {
        let format = match self.numbers.of_module(module, names) {
            Numbers::Bf16 => RandomFormat::Bf16,
            Numbers::Integers { bits: 4, group } => {
                RandomFormat::Int4 { group: group.unwrap_or(module.cols) }
            }
            other @ (Numbers::Fp8 | Numbers::Integers { .. }) => {
                return Err(ModelError::Unsupported(format!(
                    "random numbers in {other:?}; choose bf16 or integers of 4 bits"
                )));
            }
        };
        let cols = cut.cols(module);
        let random = Random {
            seed: self.of(&module.stem, module.place.map_or(0, |place| place.index)),
            first_row: cut.rows().start,
            first_col: cols.start,
            format,
        };
        let (rows, stored) = (cut.rows().len(), Stored::Random(random));
        Ok(WeightPart { rows, cols: cols.len(), stored })
    }

    /// Some numbers of a bias.
    pub fn bias(self, module: &Module, rows: Range<usize>) -> Vec<f32> {
        let seed = self.of(&module.tensor("bias"), 0);
        let (first_col, format) = (0, RandomFormat::Bf16);
        let random = Random { seed, first_row: rows.start, first_col, format };
        (0..rows.len()).map(|row| random.number(row, 0)).collect()
    }
}

/// The refusal to read what is not there.
pub(super) fn no_numbers(name: &str) -> ModelError {
    ModelError::Checkpoint(format!(
        "{name} has a configuration and no weights: it can be planned, not loaded"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Shard;

    fn folder(name: &str) -> tempfile::TempDir {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public");
        let folder = tempfile::tempdir().expect("a folder");
        let config = golden.join(name).join("config.json");
        std::fs::copy(config, folder.path().join("config.json")).expect("a configuration");
        folder
    }

    #[test]
    fn an_outline_has_the_sizes_of_the_checkpoint_and_no_numbers() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/public");
        for name in ["qwen2_mha_hd64", "qwen2_gptq_int4", "qwen2_awq_int4", "qwen3_moe"] {
            let whole = Checkpoint::open(&golden.join(name)).expect(name);
            let folder = folder(name);
            let outline = Checkpoint::open_or_outline(folder.path()).expect(name);
            let shard = |rank| whole.shard(rank, 2).expect("two ranks");
            assert_eq!(outline.config(), whole.config());
            assert_eq!(outline.parameters().expect(name), whole.parameters().expect(name));
            let rows = |checkpoint: &Checkpoint, rank| {
                checkpoint
                    .stacks(&shard(rank))
                    .expect("shapes")
                    .into_iter()
                    .map(|stack| {
                        let cols = stack.parts.iter().map(|part| (part.rows, part.cols));
                        (stack.role, cols.collect::<Vec<_>>())
                    })
                    .collect::<Vec<_>>()
            };
            assert_eq!(rows(&outline, 1), rows(&whole, 1), "{name}");
            let refused = outline.embed(&shard(0)).expect_err("no numbers").to_string();
            assert!(refused.contains("no weights"), "{refused}");
        }
    }

    #[test]
    fn random_numbers_are_the_same_in_every_share_and_norms_are_ones() {
        let folder = folder("qwen2_mha_hd64");
        let random = |numbers, seed| Checkpoint::random(folder.path(), numbers, seed).expect("one");
        let (model, other) = (random(Numbers::Bf16, 1), random(Numbers::Bf16, 2));
        assert_eq!(model.final_norm().expect("a norm"), vec![1.0; 128]);
        assert_eq!(model.input_norm(1).expect("a norm"), vec![1.0; 128]);
        let whole = model.shard(0, 1).expect("one rank");
        let second = model.shard(1, 2).expect("two ranks");
        let bias = |checkpoint: &Checkpoint, shard: &Shard| {
            checkpoint.qkv_bias(0, shard).expect("biases").expect("some")
        };
        // Two heads of 64 for each of Q, K and V.
        let all = bias(&model, &whole);
        let wanted: Vec<f32> = all.chunks(128).flat_map(|heads| &heads[64..]).copied().collect();
        assert_eq!(bias(&model, &second), wanted);
        assert_ne!(all, bias(&other, &whole));
        let row = |part: &WeightPart<'_>, n| {
            let mut row = vec![0.0; part.cols];
            kernels::plain::dequant::part_row(part, n, &mut row);
            row
        };
        let down = |shard: &Shard| {
            let parts = model.down(1, crate::FfnBlock::Dense, shard).expect("a matrix");
            parts.into_iter().next().expect("a part")
        };
        assert_eq!(row(&down(&second), 3), row(&down(&whole), 64 + 3));
        let embedding = |checkpoint: &Checkpoint| row(&checkpoint.embed(&whole).expect("it")[0], 9);
        assert_ne!(embedding(&model), embedding(&other));
        assert!(embedding(&model).iter().all(|number| number.is_finite()));
        // Tables are no integers.
        assert_eq!(embedding(&random(Numbers::INT4, 1)), embedding(&model));
        let integers = random(Numbers::INT4, 1);
        let gate_up = integers.gate_up(0, crate::FfnBlock::Dense, &whole).expect("a matrix");
        assert!(matches!(
            gate_up[0].stored,
            Stored::Random(Random { format: RandomFormat::Int4 { group: 128 }, .. })
        ));
        assert!(random(Numbers::Fp8, 1).attn_out(0, &whole).is_err());
    }
}
