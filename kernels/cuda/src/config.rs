//! How a device is used.

use super::{KvFormat, PrefillKernel, WeightFormat};
use serde::{Deserialize, Serialize};

/// How a device is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CudaConfig {
    pub kv_format: KvFormat,
    pub prefill: PrefillKernel,
    pub weights: WeightFormat,
    /// Kernels begin while the one before them still runs, where the device knows how (compute
    /// capability 9.0). Not for ranks that share a card: kernels that wait for their own rank's
    /// would take the room of those that this one waits for.
    pub overlap: bool,
}

impl Default for CudaConfig {
    /// bf16 throughout, the fastest kernels.
    fn default() -> Self {
        Self {
            kv_format: KvFormat::Bf16,
            prefill: PrefillKernel::Fastest,
            weights: WeightFormat::Bf16,
            overlap: true,
        }
    }
}
