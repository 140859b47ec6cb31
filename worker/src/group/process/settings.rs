//! What a rank's process is told to load.

use std::{net::SocketAddr, path::PathBuf};

use cpu::{CpuConfig, Isa, Precision};
use cuda::{CudaConfig, KvFormat, WeightFormat};
use model::RunnerOptions;
use serde::{Deserialize, Serialize};

use crate::{
    WorkerError,
    group::{Device, follower::RankOptions, sizing::Sizing},
};

/// What a rank loads: the leader's first message.
#[derive(Serialize, Deserialize)]
pub(super) struct Settings {
    pub model: PathBuf,
    /// `None` is the CPU.
    cuda: Option<CudaSettings>,
    threads: usize,
    exact: bool,
    isa: String,
    blocks: usize,
    step_tokens_max: usize,
    sequences_max: usize,
    context_max: usize,
    /// Where rank 0 listens for the data plane.
    pub data: String,
}

/// The first card, and whether weights and KV caches are in e4m3.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct CudaSettings {
    first: usize,
    weights_fp8: bool,
    kv_fp8: bool,
}

impl CudaSettings {
    fn device(self) -> Device {
        let config = CudaConfig {
            weights: if self.weights_fp8 { WeightFormat::Fp8 } else { WeightFormat::Bf16 },
            kv_format: if self.kv_fp8 { KvFormat::Fp8 } else { KvFormat::Bf16 },
            ..CudaConfig::default()
        };
        Device::Cuda { first: self.first, config }
    }
}

impl Settings {
    pub fn new(sizing: &Sizing, data: SocketAddr) -> Self {
        let RankOptions { cpu: CpuConfig { threads, precision, isa }, runner } =
            sizing.rank_options();
        Self {
            model: sizing.config.model.clone(),
            cuda: match sizing.config.device {
                Device::Cpu => None,
                Device::Cuda { first, config } => Some(CudaSettings {
                    first,
                    weights_fp8: config.weights == WeightFormat::Fp8,
                    kv_fp8: config.kv_format == KvFormat::Fp8,
                }),
            },
            threads,
            exact: precision == Precision::Exact,
            isa: isa.name().to_owned(),
            blocks: runner.blocks,
            step_tokens_max: runner.step_tokens_max,
            sequences_max: runner.sequences_max,
            context_max: runner.context_max,
            data: data.to_string(),
        }
    }

    pub fn rank_options(&self) -> Result<RankOptions, WorkerError> {
        let isa = Isa::ALL.into_iter().find(|isa| isa.name() == self.isa).ok_or_else(|| {
            WorkerError::Config(format!("the leader's instruction set {} is unknown", self.isa))
        })?;
        let precision = if self.exact { Precision::Exact } else { Precision::Fast };
        Ok(RankOptions {
            cpu: CpuConfig { threads: self.threads, precision, isa },
            runner: RunnerOptions {
                blocks: self.blocks,
                step_tokens_max: self.step_tokens_max,
                sequences_max: self.sequences_max,
                context_max: self.context_max,
            },
        })
    }

    pub fn device(&self) -> Device {
        self.cuda.map_or(Device::Cpu, CudaSettings::device)
    }
}
