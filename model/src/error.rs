//! Why a model could not be loaded, or a step not run.

use collective::CollectiveError;
use kernels::KernelError;

/// One variant for each case that a caller treats differently.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The checkpoint's files cannot be read or contradict themselves.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    /// The checkpoint is sound, but says something that this program does not do.
    #[error("unsupported model: {0}")]
    Unsupported(String),
    /// More ranks than the model can be split over.
    #[error("cannot split over {world_size} ranks: {reason}; at most {max} ranks work")]
    Ranks { world_size: usize, max: usize, reason: String },
    /// A setting that the model or the machine cannot meet.
    #[error("{0}")]
    Options(String),
    /// A plan that contradicts itself, the model or the cache: nothing was run.
    #[error("refused plan {number}: {reason}")]
    Plan { number: u64, reason: String },
    /// The device refused or failed. The rank is unusable.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The other ranks. The group is unusable.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error("reading {path}: {source}")]
    Io { path: String, source: std::io::Error },
}
