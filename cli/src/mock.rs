//! Flags of the engine that computes nothing.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use worker::{MockConfig, MockFault};

/// What runs the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EngineName {
    /// The model's ranks
    Model,
    /// Nothing: tokens without a meaning, at a pace of one's choice, to try clusters and faults out
    Mock,
}

#[derive(Args, Debug)]
pub struct EngineArgs {
    /// What runs the model
    #[arg(long, value_enum, default_value = "model", env = "LOCKSTEP_ENGINE")]
    pub engine: EngineName,
    /// Milliseconds of each step of a mock engine [default: 10]
    #[arg(long, env = "LOCKSTEP_MOCK_STEP_MS")]
    mock_step_ms: Option<u32>,
    /// Microseconds for each token of a step of a mock engine [default: 20]
    #[arg(long, env = "LOCKSTEP_MOCK_TOKEN_US")]
    mock_token_us: Option<u32>,
    /// How a mock engine fails once it has sampled so many tokens, as VERB@TOKENS with one of die,
    /// fail, freeze, slow, corrupt, nan
    #[arg(long, env = "LOCKSTEP_MOCK_FAULT")]
    mock_fault: Option<MockFault>,
}

impl EngineArgs {
    /// `None` for a real engine.
    pub fn mock(&self) -> Result<Option<MockConfig>> {
        let given = [
            ("--mock-step-ms", self.mock_step_ms.is_some()),
            ("--mock-token-us", self.mock_token_us.is_some()),
            ("--mock-fault", self.mock_fault.is_some()),
        ];
        if self.engine == EngineName::Model {
            match given.iter().find(|(_, given)| *given) {
                Some((flag, _)) => bail!("{flag} is for --engine mock; add that, or leave it out"),
                None => return Ok(None),
            }
        }
        let mut config = MockConfig { fault: self.mock_fault, ..MockConfig::default() };
        if let Some(milliseconds) = self.mock_step_ms {
            config.step = Duration::from_millis(milliseconds.into());
        }
        if let Some(microseconds) = self.mock_token_us {
            config.token = Duration::from_micros(microseconds.into());
        }
        Ok(Some(config))
    }
}
