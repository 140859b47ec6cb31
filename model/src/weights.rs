//! A checkpoint on disk, in the decoder's own words.
//!
//! Opening checks everything that can be checked without reading weights: that the files are whole,
//! that every tensor of the architecture is there in the right shape and a format that the kernels
//! multiply, and that there are no others. Afterwards each method reads one rank's slice of one
//! thing, and no other bytes; nothing is cached.

mod ahead;
mod expected;
mod facts;
mod fingerprint;
mod module;
mod modules;
mod names;
mod outline;
mod quantised;
mod slice;
mod stacks;

use std::path::{Path, PathBuf};

use formats::{FormatError, Layout, Tensors};
use kernels::WeightPart;

use crate::{
    DecoderConfig, ModelError, Shard,
    config::{Quantisation, RopeScaling},
};
pub(crate) use ahead::Weights;
use ahead::{AHEAD, read_ahead};
use expected::Expected;
use module::{Cut, Files, Module};
pub use modules::FfnBlock;
use modules::Modules;
pub(crate) use names::{ExpertNames, FfnNames, GGUF, Qkv, TensorNames};
pub use outline::Numbers;
use outline::{Seeded, no_numbers};
pub use stacks::{Role, Stack};

/// Configurations beyond this are no configurations.
const CONFIG_BYTES_MAX: u64 = 16 << 20;

/// Weights and configuration of one model. Ranks may share one: reading takes `&self`.
pub struct Checkpoint {
    config: DecoderConfig,
    name: String,
    names: TensorNames,
    source: Source,
}

/// Where the numbers are.
enum Source {
    Files {
        tensors: Tensors,
        quantisation: Quantisation,
    },
    /// Nowhere: there are shapes only.
    Outline(Numbers),
    /// Made as they are read.
    Seeded(Seeded),
}

impl Checkpoint {
    /// Opens a Hugging Face folder, a GGUF file, or a folder with one GGUF file.
    ///
    /// # Errors
    /// `Io` and `Checkpoint` where files are missing, damaged or contradict the configuration,
    /// with names, found and expected shapes; `Unsupported` names what is not done here.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let layout = formats::locate(path)?;
        let (tensors, metadata) = Tensors::open(&layout)?;
        let (config, names, quantisation) = match (&layout, metadata) {
            (Layout::Safetensors { folder, .. }, _) => {
                let text = read_config(&folder.join("config.json"))?;
                let config = DecoderConfig::from_json(&text)?;
                let names = config.family.names;
                (config, names, Quantisation::from_json(&text)?)
            }
            (Layout::Gguf { .. }, metadata) => {
                let metadata = metadata.unwrap_or_default();
                let mut config = DecoderConfig::from_gguf(&metadata, &tensors)?;
                let names = config.family.gguf_names;
                apply_rope_divisors(&mut config, &tensors)?;
                (config, names, Quantisation::None)
            }
        };
        expected::check(Files { tensors: &tensors, quantisation }, &config, &names)?;
        let name = model_name(&layout, path);
        Ok(Self { config, name, names, source: Source::Files { tensors, quantisation } })
    }

    /// Refuses quantised matrices whose scales are zero, no numbers or out of range, or whose
    /// columns name groups that are not there: what is small beside the weights, and decides
    /// whether they mean anything.
    ///
    /// Opening does not: of 72B in GPTQ that is 1.1 GB to read, which a tool that only looks at a
    /// model, or sizes it, need not wait for. Who loads a model reads it all the same.
    ///
    /// # Errors
    /// `Checkpoint` names the tensor; `Io` where the files cannot be read.
    pub(crate) fn check_scales(&self) -> Result<(), ModelError> {
        if let Source::Seeded(_) = self.source {
            return Ok(());
        }
        let files = self.files()?;
        let modules = Expected::each(&self.config, &self.names)?.flat_map(|each| each.modules);
        let modules: Vec<Module> = modules.collect();
        let check = |at: usize| files.check_scales(&modules[at]);
        // They are small, and none is kept.
        read_ahead(vec![0; modules.len()], AHEAD, check, |checked| {
            modules.iter().try_for_each(|_| checked.take(&mut |_| {}))
        })
    }

    /// Calls `take` with what hands out the weights of `shard`, in the order of [`Self::stacks`].
    /// Several threads read ahead of it.
    ///
    /// # Errors
    /// What `take` says; where it takes a weight, what the files say.
    pub(crate) fn read_ahead<R>(
        &self,
        shard: &Shard,
        take: impl FnOnce(&Weights<'_>) -> Result<R, ModelError>,
    ) -> Result<R, ModelError> {
        let stacks: Vec<_> = self.modules().stacks(shard).map(|(_, cuts)| cuts).collect();
        let bytes = |cuts: &Vec<(Module, Cut)>| cuts.iter().map(|cut| self.bytes(cut)).sum();
        let sizes = stacks.iter().map(bytes).collect::<Result<_, _>>()?;
        read_ahead(sizes, AHEAD, |at| self.read(&stacks[at]), take)
    }

    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The folder's, the file's (without extension) or the hub repository's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Elements of all tensors.
    ///
    /// # Errors
    /// A configuration that not even one rank can run.
    pub fn parameters(&self) -> Result<u64, ModelError> {
        parameters(&self.config)
    }

    /// Bytes of all tensors in the files, where there are any.
    pub fn total_bytes(&self) -> u64 {
        match &self.source {
            Source::Files { tensors, .. } => tensors.total_bytes(),
            Source::Outline(_) | Source::Seeded(_) => 0,
        }
    }

    /// What `rank` of `world_size` holds.
    ///
    /// # Errors
    /// `Ranks` where the model cannot be split so far, with the largest number that works.
    pub fn shard(&self, rank: usize, world_size: usize) -> Result<Shard, ModelError> {
        Shard::new(&self.config, rank, world_size)
    }

    /// Bytes that the rank's weights take as stored in the files; a tied table counts once.
    ///
    /// # Errors
    /// A shard of another model.
    pub fn weight_bytes(&self, shard: &Shard) -> Result<u64, ModelError> {
        self.modules().all(shard).iter().map(|cut| self.bytes(cut)).sum()
    }

    /// Of the numbers of a cut.
    fn bytes(&self, (module, cut): &(Module, Cut)) -> Result<u64, ModelError> {
        match &self.source {
            Source::Files { .. } => self.files()?.bytes(module, cut),
            Source::Outline(numbers) | Source::Seeded(Seeded { numbers, .. }) => {
                Ok(numbers.bytes(module, cut, &self.names))
            }
        }
    }

    fn modules(&self) -> Modules<'_> {
        Modules { config: &self.config, names: &self.names }
    }

    fn files(&self) -> Result<Files<'_>, ModelError> {
        match &self.source {
            Source::Files { tensors, quantisation } => {
                Ok(Files { tensors, quantisation: *quantisation })
            }
            Source::Outline(_) | Source::Seeded(_) => Err(no_numbers(&self.name)),
        }
    }

    /// [V_local, H]: the embedding rows of `shard.vocab`.
    ///
    /// # Errors
    /// This and the following methods fail where the files cannot be read, or where `layer` or
    /// `shard` are another model's.
    pub fn embed(&self, shard: &Shard) -> Result<Vec<WeightPart<'static>>, ModelError> {
        self.read(&[self.modules().embed(shard)])
    }

    /// [V_local, H]: the output rows of `shard.vocab`; the embedding rows where tied.
    pub fn lm_head(&self, shard: &Shard) -> Result<Vec<WeightPart<'static>>, ModelError> {
        self.read(&[self.modules().lm_head(shard)])
    }

    /// [H].
    pub fn final_norm(&self) -> Result<Vec<f32>, ModelError> {
        self.norm(self.names.final_norm, self.config.hidden)
    }

    /// [H]: the norm before attention.
    pub fn input_norm(&self, layer: usize) -> Result<Vec<f32>, ModelError> {
        self.layer_vector(layer, self.names.input_norm, self.config.hidden)
    }

    /// [H]: the norm before the feed-forward half.
    pub fn post_norm(&self, layer: usize) -> Result<Vec<f32>, ModelError> {
        self.layer_vector(layer, self.names.post_norm, self.config.hidden)
    }

    /// [(q + 2 kv) D, H]: the rank's query rows, then key rows, then value rows.
    pub fn qkv(&self, layer: usize, shard: &Shard) -> Result<Vec<WeightPart<'static>>, ModelError> {
        self.read(&self.modules().qkv(layer, shard))
    }

    /// [(q + 2 kv) D] in the order of [`Self::qkv`]; `None` where the model has none.
    pub fn qkv_bias(&self, layer: usize, shard: &Shard) -> Result<Option<Vec<f32>>, ModelError> {
        if !self.config.qkv_bias {
            return Ok(None);
        }
        let mut bias = Vec::new();
        for (module, cut) in self.modules().qkv(layer, shard) {
            if let Source::Seeded(seeded) = self.source {
                bias.extend(seeded.bias(&module, cut.rows().clone()));
                continue;
            }
            let heads_of = match cut {
                Cut::Heads { head_dim, .. } => Some(head_dim),
                Cut::Rows(_) | Cut::Columns { .. } => None,
            };
            let rows = cut.rows().clone();
            let (tensors, name) = (self.files()?.tensors, module.tensor("bias"));
            bias.extend(slice::vector(tensors, &name, rows, heads_of)?);
        }
        Ok(Some(bias))
    }

    /// [D]: the norm of each query head; `None` where the model has none.
    pub fn q_norm(&self, layer: usize) -> Result<Option<Vec<f32>>, ModelError> {
        let norm = || self.layer_vector(layer, self.names.q_norm, self.config.head_dim);
        self.config.qk_norm.then(norm).transpose()
    }

    /// [D]: the norm of each key head; `None` where the model has none.
    pub fn k_norm(&self, layer: usize) -> Result<Option<Vec<f32>>, ModelError> {
        let norm = || self.layer_vector(layer, self.names.k_norm, self.config.head_dim);
        self.config.qk_norm.then(norm).transpose()
    }

    /// [H_local, q D]: the rows of `shard.hidden`; where results are summed, [H, q D_local].
    pub fn attn_out(
        &self,
        layer: usize,
        shard: &Shard,
    ) -> Result<Vec<WeightPart<'static>>, ModelError> {
        self.read(&[self.modules().attn_out(layer, shard)])
    }

    /// [E, H], and a row for the shared expert's gate where there is one; the same on every rank.
    /// Nothing in a layer without experts.
    pub fn router(&self, layer: usize) -> Result<Vec<WeightPart<'static>>, ModelError> {
        self.read(&self.modules().router(layer))
    }

    /// [2 I_local, H]: the rank's gate rows of a feed-forward block, then its up rows.
    pub fn gate_up(
        &self,
        layer: usize,
        block: FfnBlock,
        shard: &Shard,
    ) -> Result<Vec<WeightPart<'static>>, ModelError> {
        self.read(&self.modules().gate_up(layer, block, shard))
    }

    /// [H_local, I]: the rows of `shard.hidden`; where results are summed, [H, I_local].
    pub fn down(
        &self,
        layer: usize,
        block: FfnBlock,
        shard: &Shard,
    ) -> Result<Vec<WeightPart<'static>>, ModelError> {
        self.read(&[self.modules().down(layer, block, shard)])
    }

    fn read(&self, cuts: &[(Module, Cut)]) -> Result<Vec<WeightPart<'static>>, ModelError> {
        if let Source::Seeded(seeded) = self.source {
            let part = |(module, cut): &(Module, Cut)| seeded.part(module, cut, &self.names);
            return cuts.iter().map(part).collect();
        }
        let files = self.files()?;
        cuts.iter().map(|(module, cut)| files.read(module, cut)).collect()
    }

    fn layer_vector(&self, layer: usize, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        self.norm(&self.names.of_layer(layer, name), len)
    }

    fn norm(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        match self.source {
            Source::Seeded(_) => Ok(vec![1.0; len]),
            _ => slice::vector(self.files()?.tensors, name, 0..len, None),
        }
    }
}

/// Elements of all tensors that a Hugging Face checkpoint of this configuration has.
pub(crate) fn parameters(config: &DecoderConfig) -> Result<u64, ModelError> {
    let each = Expected::each(config, &config.family.names)?.map(|expected| {
        let matrices = expected.modules.iter().map(|module| module.rows * module.cols);
        matrices.sum::<usize>() + expected.vectors.iter().map(|(_, len)| len).sum::<usize>()
    });
    Ok(each.map(|elements| elements as u64).sum())
}

fn read_config(path: &Path) -> Result<Vec<u8>, ModelError> {
    let io = |source| ModelError::Io { path: path.display().to_string(), source };
    let len = std::fs::metadata(path).map_err(io)?.len();
    if len > CONFIG_BYTES_MAX {
        return Err(ModelError::Checkpoint(format!("{} has {len} bytes", path.display())));
    }
    std::fs::read(path).map_err(io)
}

/// Llama 3.1 and later: the outcome of their scaling rule is a tensor of the file.
fn apply_rope_divisors(config: &mut DecoderConfig, tensors: &Tensors) -> Result<(), ModelError> {
    const NAME: &str = "rope_freqs.weight";
    let Some(info) = tensors.get(NAME) else { return Ok(()) };
    if config.rope.scaling != RopeScaling::None || info.shape != [config.head_dim as u64 / 2] {
        return Err(ModelError::Checkpoint(format!(
            "{NAME} of shape {:?} with heads of {} and {:?}",
            info.shape, config.head_dim, config.rope.scaling
        )));
    }
    let divisors = slice::vector(tensors, NAME, 0..config.head_dim / 2, None)?;
    config.rope.scaling = RopeScaling::Divisors(divisors);
    config.rope.validate(config.head_dim)
}

fn model_name(layout: &Layout, path: &Path) -> String {
    let named: PathBuf = match layout {
        Layout::Safetensors { folder, .. } => {
            // `.` and `..` have no name of their own.
            folder.canonicalize().unwrap_or_else(|_| folder.clone())
        }
        Layout::Gguf { files } => files[0].with_extension(""),
    };
    let last = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let hub = named.parent().filter(|parent| parent.ends_with("snapshots"));
    let repository = hub.and_then(Path::parent).and_then(last);
    match repository.as_deref().and_then(|name| name.strip_prefix("models--")) {
        // A hub's cache: models--<owner>--<name>/snapshots/<revision>.
        Some(name) => name.rsplit("--").next().unwrap_or(name).to_owned(),
        None => last(&named).unwrap_or_else(|| path.display().to_string()),
    }
}

impl From<FormatError> for ModelError {
    fn from(error: FormatError) -> Self {
        match error {
            FormatError::Io { path, source } => Self::Io { path, source },
            FormatError::Unsupported(what) => Self::Unsupported(what),
            FormatError::In { path, source } => match *source {
                FormatError::Unsupported(what) => Self::Unsupported(format!("{path}: {what}")),
                other => Self::Checkpoint(format!("{path}: {other}")),
            },
            other => Self::Checkpoint(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_after_what_they_lie_in() {
        let folder = |path: &str| {
            let layout = Layout::Safetensors { folder: path.into(), files: vec![], index: None };
            model_name(&layout, Path::new(path))
        };
        assert_eq!(folder("/none/Qwen3-8B/"), "Qwen3-8B");
        let hub =
            "/none/hub/models--Qwen--Qwen2.5-0.5B-Instruct/snapshots/7ae557604adf67be50417f59";
        assert_eq!(folder(hub), "Qwen2.5-0.5B-Instruct");
        let file = Layout::Gguf { files: vec!["/none/a.b-Q4_K_M.gguf".into()] };
        assert_eq!(model_name(&file, Path::new("/none")), "a.b-Q4_K_M");
    }
}
