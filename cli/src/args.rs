//! Flags that several commands share, as typed on the command line or set in the environment.
//!
//! Raw here; `resolve` turns them into the typed configuration that the crates take.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use cluster::telemetry::LogFormat;
use cpu::{Isa, Precision};
use cuda::{CudaConfig, KvFormat, WeightFormat};
use model::Numbers;
use worker::{Device, GroupConfig, NcclUse, RankMode};

use crate::source;

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PrecisionName {
    /// Activations rounded where the weights' format is made for it.
    Fast,
    /// f32 activations against the stored weights.
    Exact,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum IsaName {
    Portable,
    Avx2,
    Avx512,
    Amx,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormatName {
    Human,
    Json,
}

/// Numbers of 16 or of 8 bits.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum FloatName {
    Bf16,
    /// e4m3
    Fp8,
}

/// Where a model's weights come from, and how they are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WeightsName {
    Bf16,
    /// e4m3
    Fp8,
    /// Numbers from a seed, in bf16
    Random,
    /// Numbers from a seed, rounded to e4m3
    RandomFp8,
    /// Numbers from a seed, in 4 bits
    RandomInt4,
}

impl WeightsName {
    /// What a model without a checkpoint's numbers is stored as.
    fn random(self) -> Option<Numbers> {
        match self {
            Self::Bf16 | Self::Fp8 => None,
            Self::Random | Self::RandomFp8 => Some(Numbers::Bf16),
            Self::RandomInt4 => Some(Numbers::INT4),
        }
    }
}

/// How the process logs; the filter comes from LOCKSTEP_LOG.
#[derive(Args, Debug)]
pub struct LogArgs {
    /// Log lines for people or for machines
    #[arg(long, global = true, value_enum, default_value = "human", env = "LOCKSTEP_LOG_FORMAT")]
    log_format: LogFormatName,
}

impl LogArgs {
    pub fn format(&self) -> LogFormat {
        match self.log_format {
            LogFormatName::Human => LogFormat::Human,
            LogFormatName::Json => LogFormat::Json,
        }
    }
}

/// A model and the ranks that hold it.
#[derive(Args, Clone, Debug)]
pub struct GroupArgs {
    /// A file, a folder, a short name, org/name[:file], modelscope:org/name or demo
    #[arg(long, default_value = "demo", env = "LOCKSTEP_MODEL")]
    pub model: String,
    /// Tensor-parallel ranks
    #[arg(long, default_value_t = 1, env = "LOCKSTEP_TP")]
    tp: usize,
    /// Compute threads of each rank [default: the machine's, shared evenly]
    #[arg(long, env = "LOCKSTEP_THREADS")]
    threads: Option<usize>,
    /// What computes: cpu, cuda, or cuda:N for cards from N on, one for each rank
    #[arg(long, value_parser = device, default_value = "cpu", env = "LOCKSTEP_DEVICE")]
    device: Device,
    /// Lets all ranks take the first CUDA card where there are fewer cards than ranks: slow, for
    /// tests
    #[arg(long, env = "LOCKSTEP_SHARE_CARDS")]
    share_cards: bool,
    /// Whether CUDA cards may exchange by NCCL, 2.18 or newer, which they need where they do not
    /// reach each other's memory, and use for the largest sums: auto, off, or the library's path
    /// [default: auto, by the name libnccl.so.2]
    #[arg(long, value_parser = nccl, value_name = "auto|off|PATH", env = "LOCKSTEP_NCCL")]
    nccl: Option<NcclUse>,
    /// How CUDA cards keep the layers' weights, whatever the file stores; fp8 halves their memory,
    /// rounded with a scale for each row as they are loaded [default: bf16]; random takes numbers
    /// from a seed instead of the file's, to measure speed: a folder with config.json is enough
    #[arg(long, value_enum, env = "LOCKSTEP_WEIGHTS")]
    weights: Option<WeightsName>,
    /// How CUDA cards keep keys and values; fp8, with a scale for each token and head, takes about
    /// half the memory [default: bf16]
    #[arg(long, value_enum, env = "LOCKSTEP_KV_CACHE")]
    kv_cache: Option<FloatName>,
    /// Whether activations may be rounded for speed
    #[arg(long, value_enum, default_value = "fast", env = "LOCKSTEP_PRECISION")]
    precision: PrecisionName,
    /// The best instruction set to use [default: the machine's best]
    #[arg(long, value_enum, env = "LOCKSTEP_ISA")]
    isa: Option<IsaName>,
    /// Tokens of prompt and answer together [default: the model's, as far as memory allows]
    #[arg(long, env = "LOCKSTEP_CONTEXT")]
    context: Option<usize>,
    /// Memory of the KV cache, all ranks together, e.g. 512M or 4G [default: by context and memory]
    #[arg(long, value_parser = bytes, env = "LOCKSTEP_KV_MEMORY")]
    kv_memory: Option<u64>,
    /// Tokens in one step, at most [default: 512, on CUDA cards 4096 or what memory allows]
    #[arg(long, env = "LOCKSTEP_STEP_TOKENS")]
    step_tokens: Option<usize>,
    /// Seconds that a step should take while answers wait for their next tokens: prompts get fewer
    /// tokens of a step until it does, whatever the machine's speed [default: 0.25]
    #[arg(long, value_parser = seconds, env = "LOCKSTEP_STEP_SECONDS")]
    step_seconds: Option<Duration>,
    /// Seconds after which a card that has not finished a step is taken for hung [default: several
    /// times the predicted time of the longest step, at least 1]
    #[arg(long, value_parser = seconds, env = "LOCKSTEP_STEP_DEADLINE_SECONDS")]
    step_deadline_seconds: Option<Duration>,
    /// Sequences that run at once, at most [default: 64, on CUDA cards 256]
    #[arg(long, env = "LOCKSTEP_SEQUENCES")]
    sequences: Option<usize>,
}

impl GroupArgs {
    /// Of the whole group.
    pub fn ranks(&self) -> usize {
        self.tp
    }

    /// Finds the model, fetching it if need be, and checks the rest.
    pub fn resolve(&self, rank_mode: RankMode) -> Result<GroupConfig> {
        for (flag, value) in [
            ("--tp", Some(self.tp)),
            ("--threads", self.threads),
            ("--context", self.context),
            ("--step-tokens", self.step_tokens),
            ("--sequences", self.sequences),
        ] {
            if value == Some(0) {
                bail!("{flag} must be at least 1");
            }
        }
        let random = self.weights.and_then(WeightsName::random);
        let model = match random {
            // No weights are fetched that would not be read.
            Some(_) => source::present(&self.model)?,
            None => source::resolve(&self.model)?,
        };
        let mut config = GroupConfig::new(model);
        config.random = random;
        config.ranks = self.tp;
        config.device = self.device()?;
        config.threads_per_rank = self.threads;
        config.precision = match self.precision {
            PrecisionName::Fast => Precision::Fast,
            PrecisionName::Exact => Precision::Exact,
        };
        config.isa_cap = self.isa.map(|isa| match isa {
            IsaName::Portable => Isa::Portable,
            IsaName::Avx2 => Isa::Avx2,
            IsaName::Avx512 => Isa::Avx512,
            IsaName::Amx => Isa::Amx,
        });
        config.context_max = self.context;
        config.kv_memory = self.kv_memory;
        config.step_tokens_max = self.step_tokens;
        config.step_target = self.step_seconds;
        config.step_deadline = self.step_deadline_seconds;
        // A card's products are bound by the weights' bytes up to about this many rows.
        let many = if config.device == Device::Cpu { config.sequences_max } else { 256 };
        config.sequences_max = self.sequences.unwrap_or(many);
        config.rank_mode = rank_mode;
        Ok(config)
    }

    fn device(&self) -> Result<Device> {
        let mut device = self.device.clone();
        use WeightsName::{Bf16, Fp8, RandomFp8};
        let Device::Cuda { config, share, nccl, .. } = &mut device else {
            let given = [
                ("--weights", matches!(self.weights, Some(Bf16 | Fp8 | RandomFp8))),
                ("--kv-cache", self.kv_cache.is_some()),
                ("--share-cards", self.share_cards),
                ("--nccl", self.nccl.is_some()),
            ];
            for (flag, given) in given {
                if given {
                    bail!("{flag} is for CUDA cards; add --device cuda, or leave it out");
                }
            }
            return Ok(device);
        };
        *share = self.share_cards;
        *nccl = self.nccl.clone().unwrap_or_default();
        if let Some(Fp8 | RandomFp8) = self.weights {
            config.weights = WeightFormat::Fp8;
        }
        if let Some(FloatName::Fp8) = self.kv_cache {
            config.kv_format = KvFormat::Fp8;
        }
        Ok(device)
    }
}

/// `cpu`, `cuda` or `cuda:N`.
fn device(text: &str) -> Result<Device, String> {
    let wrong = || format!("{text:?} is no device; write cpu, cuda or cuda:N");
    let config = CudaConfig::default();
    let cuda = |first| Device::Cuda { first, config, share: false, nccl: NcclUse::Auto };
    match text.split_once(':') {
        None if text == "cpu" => Ok(Device::Cpu),
        None if text == "cuda" => Ok(cuda(0)),
        Some(("cuda", number)) => number.parse().map(cuda).map_err(|_| wrong()),
        _ => Err(wrong()),
    }
}

/// `auto`, `off` or a library's path; one without a folder is looked for as the loader does.
fn nccl(text: &str) -> Result<NcclUse, String> {
    match text {
        "" => Err("no library is named; write auto, off or a path".into()),
        "auto" => Ok(NcclUse::Auto),
        "off" => Ok(NcclUse::Off),
        path => Ok(NcclUse::At(path.into())),
    }
}

/// A number of seconds above 0.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time above 0; write seconds, e.g. 0.25");
    let seconds: f64 = text.parse().map_err(|_| wrong())?;
    let time = Duration::try_from_secs_f64(seconds).map_err(|_| wrong())?;
    if time.is_zero() { Err(wrong()) } else { Ok(time) }
}

/// A number of bytes, with K, M, G or T for powers of 1024.
fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no amount of memory; write e.g. 512M or 4G");
    let upper = text.trim().to_ascii_uppercase();
    let upper = upper.strip_suffix("IB").or(upper.strip_suffix('B')).unwrap_or(&upper);
    let (digits, shift) = match upper.char_indices().next_back() {
        Some((at, 'K')) => (&upper[..at], 10),
        Some((at, 'M')) => (&upper[..at], 20),
        Some((at, 'G')) => (&upper[..at], 30),
        Some((at, 'T')) => (&upper[..at], 40),
        _ => (upper, 0),
    };
    let number: u64 = digits.trim().parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_with_their_number() {
        let config = CudaConfig::default();
        let cuda = |first| Device::Cuda { first, config, share: false, nccl: NcclUse::Auto };
        assert_eq!(device("cpu"), Ok(Device::Cpu));
        assert_eq!(device("cuda"), Ok(cuda(0)));
        assert_eq!(device("cuda:3"), Ok(cuda(3)));
        for text in ["", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x"] {
            assert!(device(text).is_err(), "{text}");
        }
    }

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        group: GroupArgs,
    }

    fn parsed(line: &str) -> Result<Device> {
        use clap::Parser;
        Line::try_parse_from(line.split(' ')).expect("flags that exist").group.device()
    }

    #[test]
    fn formats_are_for_cards() {
        let config = |weights, kv_format| CudaConfig { weights, kv_format, ..Default::default() };
        let cuda = |first, weights, kv| {
            let (config, nccl) = (config(weights, kv), NcclUse::Auto);
            Device::Cuda { first, config, share: false, nccl }
        };
        for (line, wanted) in [
            ("x", Device::Cpu),
            ("x --device cuda:2", cuda(2, WeightFormat::Bf16, KvFormat::Bf16)),
            ("x --device cuda --weights fp8", cuda(0, WeightFormat::Fp8, KvFormat::Bf16)),
            ("x --weights random-int4", Device::Cpu),
            ("x --device cuda --weights random", cuda(0, WeightFormat::Bf16, KvFormat::Bf16)),
            ("x --device cuda --weights random-fp8", cuda(0, WeightFormat::Fp8, KvFormat::Bf16)),
            ("x --device cuda --kv-cache fp8", cuda(0, WeightFormat::Bf16, KvFormat::Fp8)),
        ] {
            assert_eq!(parsed(line).expect(line), wanted, "{line}");
        }
        for (flag, value) in [("--weights", "bf16"), ("--kv-cache", "bf16"), ("--nccl", "auto")] {
            let error = parsed(&format!("x {flag} {value}")).expect_err(flag).to_string();
            assert!(error.contains(flag) && error.contains("--device cuda"), "{error}");
        }
    }

    #[test]
    fn nccl_is_found_turned_off_or_named() {
        for (words, wanted) in [
            ("", NcclUse::Auto),
            (" --nccl auto", NcclUse::Auto),
            (" --nccl off", NcclUse::Off),
            (" --nccl /opt/libnccl.so.2", NcclUse::At("/opt/libnccl.so.2".into())),
        ] {
            let device = parsed(&format!("x --device cuda{words}")).expect(words);
            let Device::Cuda { nccl, .. } = device else { panic!("{device:?}") };
            assert_eq!(nccl, wanted, "{words}");
        }
        assert!(nccl("").is_err());
    }

    #[test]
    fn times_are_seconds_above_0() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        assert_eq!(seconds("2"), Ok(Duration::from_secs(2)));
        for text in ["", "0", "0.0", "-1", "inf", "NaN", "1e30", "1s"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn memory_is_read_with_its_unit() {
        for (text, wanted) in
            [("0", 0), ("4096", 4096), ("512M", 512 << 20), ("4g", 4 << 30), ("2GiB", 2 << 30)]
        {
            assert_eq!(bytes(text), Ok(wanted), "{text}");
        }
        for text in ["", "G", "1.5G", "-1", "99999999999T", "4X"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
