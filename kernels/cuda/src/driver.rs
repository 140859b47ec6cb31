//! What launchers need of a device: memory, launches and one matrix product.

use super::Element;
use kernels::KernelError;
use std::ffi::c_void;

/// What a launcher may ask about the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// As the driver reports it, e.g. "NVIDIA H200".
    pub name: String,
    /// Major and minor, e.g. (9, 0).
    pub compute_capability: (u32, u32),
    pub multiprocessors: u32,
    /// Shared memory that one block may ask for.
    pub shared_bytes_max: u32,
    pub memory_bytes: u64,
}

impl Facts {
    /// Whether products in e4m3 take a scale for each row of both operands: cuBLASLt's "outer
    /// vector scaling", which its documentation gives for Hopper.
    pub fn fp8_products(&self) -> bool {
        self.compute_capability.0 == 9
    }
}

/// One kernel on a grid of blocks. Launches of one driver run one after another, but for the start
/// of dependent ones (programmatic dependent launch, CUDA C++ Programming Guide).
#[derive(Clone, Copy)]
pub struct Launch<'a> {
    /// The kernel's name in `kernels/cuda`.
    pub kernel: &'a str,
    pub grid: [u32; 3],
    /// In one block; the kernel's own number.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Whether it may begin before the one before it is done: its kernel waits for that itself
    /// (`wait_prerequisites` of `overlap.cuh`), in every block.
    pub dependent: bool,
    args: *const c_void,
    args_len: usize,
    borrow: std::marker::PhantomData<&'a ()>,
}

impl<'a> Launch<'a> {
    /// `args` is the kernel's only argument: a `#[repr(C)]` struct laid out as the kernel's.
    pub fn new<A: Copy>(kernel: &'a str, grid: [u32; 3], threads: u32, args: &'a A) -> Self {
        let (start, args_len) = (std::ptr::from_ref(args).cast(), size_of::<A>());
        let borrow = std::marker::PhantomData;
        let (shared, dependent) = (0, false);
        Self { kernel, grid, threads, shared, dependent, args: start, args_len, borrow }
    }

    #[must_use]
    pub fn shared(mut self, bytes: u32) -> Self {
        self.shared = bytes;
        self
    }

    #[must_use]
    pub fn dependent(mut self, dependent: bool) -> Self {
        self.dependent = dependent;
        self
    }

    /// Where the argument lies, and its size.
    pub fn args(&self) -> (*const c_void, usize) {
        (self.args, self.args_len)
    }
}

/// Bytes that a driver keeps for its matrix products: what NVIDIA advises for Hopper.
pub const GEMM_WORKSPACE_BYTES: usize = 32 << 20;

/// out [m, n] = x [m, k] · weight [n, k]ᵀ (+ bias [n]), row-major, f32 sums. Addresses are the
/// device's.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    pub out: u64,
    /// bf16 or f32; a bias goes with bf16 only.
    pub out_element: Element,
    pub x: u64,
    pub weight: u64,
    /// x and weight are bf16 where there are none, e4m3 where there are: then k and n are multiples
    /// of 16, and the device is one with [`Facts::fp8_products`].
    pub scales: Option<Scales>,
    /// bf16.
    pub bias: Option<u64>,
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// What the rows of a product in e4m3 are multiplied by, in f32.
#[derive(Clone, Copy, Debug)]
pub struct Scales {
    /// [m]
    pub x: u64,
    /// [n]
    pub weight: u64,
}

/// A device. Work is done in the order of the calls; reads wait for it.
pub trait Driver: Send + Sync + Sized + 'static {
    /// Device memory, given back when dropped.
    type Memory: Send + Sync;
    /// Bytes on their way to the host.
    type Reading: Send;
    /// Launches and products that can be run again. What their arguments point to must be alive.
    type Graph: Send + Sync;

    fn facts(&self) -> &Facts;
    /// `bytes` zeroed bytes, aligned to 256.
    ///
    /// # Errors
    /// `KernelError::Memory` with `what` where there are not as many.
    fn zeroed(&self, what: &'static str, bytes: usize) -> Result<Self::Memory, KernelError>;
    /// As [`Self::zeroed`], in memory that other ranks of this machine can map.
    ///
    /// # Errors
    /// As there; `KernelError::Device` where the device has no such memory.
    fn shared(&self, what: &'static str, bytes: usize) -> Result<Self::Memory, KernelError>;
    /// What another rank needs to map memory that [`Self::shared`] made, while that is alive.
    ///
    /// # Errors
    /// `KernelError::Device` where the memory is of another kind, or the device refuses.
    fn export(&self, memory: &Self::Memory) -> Result<Vec<u8>, KernelError>;
    /// Another rank's memory, which this device reads and writes from now on.
    ///
    /// # Errors
    /// `KernelError::Device` where the memory is gone, or this device cannot reach the other's.
    fn import(&self, ticket: &[u8]) -> Result<Self::Memory, KernelError>;
    /// The device's address of the first byte.
    fn address(&self, memory: &Self::Memory) -> u64;
    /// Writes from `offset` on.
    ///
    /// # Errors
    /// `KernelError::Device` where the bytes do not fit or the device fails.
    fn write(&self, to: &Self::Memory, offset: usize, bytes: &[u8]) -> Result<(), KernelError>;
    /// Writes `bytes` bytes from `offset` on, which `fill` makes: in place, where the driver has
    /// memory of its own through which they go, while the device still copies those before.
    ///
    /// # Errors
    /// As [`Self::write`].
    fn write_with(
        &self,
        to: &Self::Memory,
        offset: usize,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), KernelError> {
        let mut made = vec![0; bytes];
        fill(&mut made);
        self.write(to, offset, &made)
    }
    /// Reads from `offset` on, once all work before is done.
    ///
    /// # Errors
    /// `KernelError::Device` where there are fewer bytes or work before has failed.
    fn read(&self, to: &mut [u8], from: &Self::Memory, offset: usize) -> Result<(), KernelError>;
    /// Begins to read `bytes` bytes from `offset` on as they are behind all work so far.
    ///
    /// # Errors
    /// `KernelError::Device` where there are fewer, or the device fails.
    fn begin_read(
        &self,
        from: &Self::Memory,
        offset: usize,
        bytes: usize,
    ) -> Result<Self::Reading, KernelError>;
    /// Waits for them, and for no later work.
    ///
    /// # Errors
    /// `KernelError::Device` where work before them has failed.
    fn end_read(&self, reading: Self::Reading) -> Result<Vec<u8>, KernelError>;
    /// # Errors
    /// `KernelError::Device` where the kernel does not exist or the device refuses.
    fn launch(&self, launch: Launch<'_>) -> Result<(), KernelError>;
    /// # Errors
    /// `KernelError::Device` where the device refuses.
    fn gemm(&self, gemm: Gemm) -> Result<(), KernelError>;
    /// The stream of this driver, for work of NCCL's between its own; the device is this thread's
    /// current one from then on.
    ///
    /// # Errors
    /// `KernelError::Device` where the device has failed, or is an emulation.
    fn stream(&self) -> Result<*mut c_void, KernelError> {
        Err(KernelError::Device("NCCL does not run on an emulated device".into()))
    }
    /// Products to bf16 with a weight [n, k], in e4m3 with scales or in bf16, are to come: a driver
    /// that has a choice for them makes it here, while nothing waits.
    ///
    /// # Errors
    /// `KernelError::Device` where the device fails.
    fn expect_products(&self, _n_k: (usize, usize), _is_fp8: bool) -> Result<(), KernelError> {
        Ok(())
    }
    /// Whether launches can be captured.
    fn captures(&self) -> bool;
    /// From now on launches and products are kept and not run. Meanwhile memory is neither taken,
    /// written nor read.
    ///
    /// # Errors
    /// `KernelError::Device` where the device fails, or is capturing already.
    fn begin_capture(&self) -> Result<(), KernelError>;
    /// What was launched since [`Self::begin_capture`].
    ///
    /// # Errors
    /// `KernelError::Device` where something was called that cannot be captured.
    fn end_capture(&self) -> Result<Self::Graph, KernelError>;
    /// Runs what was captured, as one launch.
    ///
    /// # Errors
    /// `KernelError::Device` where the device refuses.
    fn replay(&self, graph: &Self::Graph) -> Result<(), KernelError>;
}
