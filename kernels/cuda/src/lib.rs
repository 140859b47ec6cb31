//! The CUDA backend: launchers of the kernels in `cu/`, bf16 activations.
//!
//! Launchers know kernels by name and talk to a [`Driver`]: the real one (`feature = "cuda"`) or
//! the host emulation that tests use. They check shapes and indices, choose grids and pass one
//! struct of arguments, laid out as the kernel's own. Nothing here waits for the device but reads.
//!
//! It refuses what no kernel was made for: odd head sizes, rows that are no multiple of 16 bytes.

mod array;
mod attention;
mod backend;
mod bytes;
mod config;
#[cfg(feature = "cuda")]
mod device;
mod driver;
mod elementwise;
mod experts;
mod fp8;
mod graphs;
mod int4;
mod linear;
mod measure;
mod nccl;
mod norm;
mod peers;
mod random;
mod rope;
mod rows;
mod sampling;
mod shares;
mod skinny;
mod step;

pub use array::{Array, Element, Floats, Ints};
pub use attention::PrefillKernel;
pub use backend::{Cuda, LOGIT_ROWS_MAX};
pub use bytes::StepShape;
pub use config::CudaConfig;
#[cfg(feature = "cuda")]
pub use device::{Gpu, GpuConfig};
pub use driver::{Driver, Facts, GEMM_WORKSPACE_BYTES, Gemm, Launch, Scales};
pub use experts::CudaExperts;
pub use fp8::{Fp8, Fp8Scaling};
pub use linear::{RECORDS_ROWS_MAX, WeightFormat};
pub use nccl::{Communicator, NCCL_LIBRARY, Nccl, NcclLimits, NcclPlace, UniqueId};
pub use peers::{PEERS_MAX, PeerConfig, PeerRegion, Peers};
pub use rope::{CudaKv, KvFormat};
pub use sampling::SampleRoom;

#[cfg(test)]
mod tests {
    /// Kernels and launchers are compiled apart: nothing but this compares the two numbers.
    #[test]
    fn kernels_and_launchers_mean_the_same_blocks() {
        let declared = format!("constexpr int BLOCK_TOKENS = {};", kernels::BLOCK_TOKENS);
        assert!(include_str!("../cu/target.cuh").contains(&declared), "{declared}");
    }
}
