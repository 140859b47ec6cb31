//! The device: opened once for all that a process runs, described, and timed.

pub mod ceilings;

use checks::bench::{Run, Scale};
use cuda::{Cuda, CudaConfig, Driver, Facts, Gemm, Gpu, GpuConfig, Launch};
use kernels::KernelError;
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};

/// Several times what any device caches.
const FLUSH_BYTES: usize = 1 << 30;
/// What is read then, to so few bytes that a cache hardly has any to write back.
const READ_BYTES: usize = 512 << 20;
const SMALL_BYTES: usize = 8 << 20;

type Memory = <Gpu as Driver>::Memory;

/// One device, however many checks or benches use it one after another: code is loaded once, and a
/// sanitizer instruments it once.
#[derive(Clone)]
pub struct Card {
    gpu: Arc<Gpu>,
    config: GpuConfig,
}

impl Card {
    pub fn open(ordinal: usize, wait_limit: Duration) -> Result<Self, KernelError> {
        Self::with(GpuConfig::with_limit(ordinal, wait_limit))
    }

    fn with(config: GpuConfig) -> Result<Self, KernelError> {
        Ok(Self { gpu: Arc::new(Gpu::open(config)?), config })
    }

    /// Opened once more, with a stream of its own, where another backend is in use: ranks do not
    /// share theirs.
    ///
    /// # Panics
    /// Where that fails; checks have no other way to be told.
    pub fn backend(&self, config: CudaConfig) -> Cuda<Self> {
        let card = match Arc::strong_count(&self.gpu) {
            1 => self.clone(),
            _ => Self::with(self.config).unwrap_or_else(|error| panic!("{error}")),
        };
        Cuda::new(card, config)
    }

    /// Who it is, for the report.
    pub fn about(&self) -> Result<Value, KernelError> {
        let facts = self.facts();
        let (major, minor) = facts.compute_capability;
        Ok(json!({
            "device": facts.name,
            "compute_capability": format!("{major}.{minor}"),
            "driver": self.gpu.driver_version()?,
        }))
    }

    /// cuBLASLt's version, and what its products were led around.
    pub fn products(&self) -> (String, Vec<String>) {
        self.gpu.products()
    }

    pub fn kernels(&self) -> usize {
        self.gpu.kernels()
    }

    /// By the device's own clock.
    pub fn time(
        &self,
        work: &mut dyn FnMut() -> Result<(), KernelError>,
    ) -> Result<Duration, KernelError> {
        self.gpu.time(work)
    }

    /// Waits for all work so far: a fault is told to whom it belongs.
    pub fn settle(&self) -> Result<(), KernelError> {
        self.gpu.settle()
    }
}

impl Driver for Card {
    type Memory = Memory;
    type Graph = <Gpu as Driver>::Graph;
    type Reading = <Gpu as Driver>::Reading;

    fn facts(&self) -> &Facts {
        self.gpu.facts()
    }

    fn zeroed(&self, what: &'static str, bytes: usize) -> Result<Memory, KernelError> {
        self.gpu.zeroed(what, bytes)
    }

    fn shared(&self, what: &'static str, bytes: usize) -> Result<Memory, KernelError> {
        self.gpu.shared(what, bytes)
    }

    fn export(&self, memory: &Memory) -> Result<Vec<u8>, KernelError> {
        self.gpu.export(memory)
    }

    fn import(&self, ticket: &[u8]) -> Result<Memory, KernelError> {
        self.gpu.import(ticket)
    }

    fn address(&self, memory: &Memory) -> u64 {
        self.gpu.address(memory)
    }

    fn write(&self, to: &Memory, offset: usize, bytes: &[u8]) -> Result<(), KernelError> {
        self.gpu.write(to, offset, bytes)
    }

    fn write_with(
        &self,
        to: &Memory,
        offset: usize,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), KernelError> {
        self.gpu.write_with(to, offset, bytes, fill)
    }

    fn read(&self, to: &mut [u8], from: &Memory, offset: usize) -> Result<(), KernelError> {
        self.gpu.read(to, from, offset)
    }

    fn begin_read(
        &self,
        from: &Memory,
        offset: usize,
        bytes: usize,
    ) -> Result<Self::Reading, KernelError> {
        self.gpu.begin_read(from, offset, bytes)
    }

    fn end_read(&self, reading: Self::Reading) -> Result<Vec<u8>, KernelError> {
        self.gpu.end_read(reading)
    }

    fn launch(&self, launch: Launch<'_>) -> Result<(), KernelError> {
        self.gpu.launch(launch)
    }

    fn gemm(&self, gemm: Gemm) -> Result<(), KernelError> {
        self.gpu.gemm(gemm)
    }

    fn expect_products(&self, n_k: (usize, usize), is_fp8: bool) -> Result<(), KernelError> {
        self.gpu.expect_products(n_k, is_fp8)
    }

    fn captures(&self) -> bool {
        self.gpu.captures()
    }

    fn begin_capture(&self) -> Result<(), KernelError> {
        self.gpu.begin_capture()
    }

    fn end_capture(&self) -> Result<Self::Graph, KernelError> {
        self.gpu.end_capture()
    }

    fn replay(&self, graph: &Self::Graph) -> Result<(), KernelError> {
        self.gpu.replay(graph)
    }
}

/// Empties the device's caches and times a run by the device's own clock.
pub struct Stopwatch {
    from: Memory,
    to: Memory,
    small: Memory,
    /// Of `from`, `small`, and what is read of `from`.
    bytes: [usize; 3],
}

impl Stopwatch {
    pub fn new(card: &Card, scale: Scale) -> Result<Self, KernelError> {
        let room = |bytes| card.zeroed("emptying caches", bytes);
        let bytes = scale.of([FLUSH_BYTES, SMALL_BYTES, READ_BYTES], [1024, 512, 1024]);
        Ok(Self { from: room(bytes[0])?, to: room(bytes[0])?, small: room(bytes[1])?, bytes })
    }

    /// A copy drives everything out of the caches, and reads drive out what it wrote: else the run
    /// would pay for writing that back. Both are still busy while the run is launched, so that
    /// launching is not timed.
    pub fn time(&self, device: &Cuda<Card>, run: &mut Run<Card>) -> Result<Duration, KernelError> {
        let gpu = &device.driver().gpu;
        let [all, small, read] = self.bytes;
        gpu.copy(&self.to, (&self.from, 0), all)?;
        for at in (0..read).step_by(small) {
            gpu.copy(&self.small, (&self.from, at), small)?;
        }
        gpu.time(&mut || run(device))
    }
}
