//! The real device: NVIDIA's driver, opened at run time, and the kernels embedded in this binary.
//!
//! One device, one stream, work in the order of the calls. Nothing waits for the device without a
//! deadline; a device that failed or hung refuses all further work, since its memory can no longer
//! be trusted. No CUDA library is linked: where one is missing, opening says which and what to do.

mod blas;
mod context;
mod event;
mod functions;
mod graph;
mod handles;
mod mapping;
mod memory;
mod patience;
mod retired;

use super::{Driver, Facts, Gemm, Launch};
use blas::Blas;
use context::{Context, call};
use cudarc::driver::sys;
use event::Event;
use functions::Functions;
pub use graph::Graph;
use kernels::KernelError;
use memory::{Downloads, Readings, Uploads};
pub use memory::{Memory, Reading};
use std::{
    ffi::c_void,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Which device, and how long it may keep the host waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuConfig {
    /// As the driver counts, from 0.
    pub ordinal: usize,
    /// A device that has not finished after this is taken for hung.
    pub wait_limit: Duration,
    /// The same for the first wait behind so many kernels, where code may have to be loaded.
    pub first_wait_limit: Duration,
}

impl GpuConfig {
    /// The longest step takes seconds; 30 of them are a hang.
    pub fn new(ordinal: usize) -> Self {
        Self::with_limit(ordinal, Duration::from_secs(30))
    }

    /// With `limit` for every wait, the first too.
    pub fn with_limit(ordinal: usize, limit: Duration) -> Self {
        Self { ordinal, wait_limit: limit, first_wait_limit: limit }
    }
}

/// One CUDA device.
pub struct Gpu {
    // Before the context, which they need to end.
    functions: Functions,
    uploads: Mutex<Uploads>,
    downloads: Mutex<Downloads>,
    readings: Mutex<Readings>,
    blas: Mutex<Blas>,
    timers: (Event, Event),
    facts: Facts,
    context: Arc<Context>,
}

impl Gpu {
    /// How many devices there are.
    ///
    /// # Errors
    /// `KernelError::Device` says what is missing where there are none.
    pub fn count() -> Result<usize, KernelError> {
        context::count()
    }

    /// Opens a device, loads every kernel and opens cuBLASLt: nothing of it is left to a step.
    ///
    /// # Errors
    /// `KernelError::Device` says what is missing: the driver, a newer one, the device, kernels for
    /// it, or cuBLASLt; `KernelError::Memory` where there is none for its workspace.
    pub fn open(config: GpuConfig) -> Result<Self, KernelError> {
        let (context, facts) = Context::open(config)?;
        let context = Arc::new(context);
        Ok(Self {
            functions: Functions::load(&context)?,
            uploads: Mutex::new(Uploads::new(&context)?),
            downloads: Mutex::new(Downloads::new(&context)?),
            readings: Mutex::default(),
            // With its workspace, so that memory said to be free is.
            blas: Mutex::new(Blas::open(&context)?),
            timers: (Event::timed(&context)?, Event::timed(&context)?),
            facts,
            context,
        })
    }

    /// Bytes that can still be allocated.
    ///
    /// # Errors
    /// `KernelError::Device` where the device has failed.
    pub fn free_bytes(&self) -> Result<u64, KernelError> {
        self.context.enter()?;
        self.context.give_back();
        let (mut free, mut total) = (0, 0);
        call!(self.context, "asking for free memory", cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok(free as u64)
    }

    /// Copies between allocations of this device, as fast as it can: to the start of one, from an
    /// offset on in the other.
    ///
    /// # Errors
    /// `KernelError::Device` where either is shorter, or the device fails.
    pub fn copy(
        &self,
        to: &Memory,
        (from, offset): (&Memory, usize),
        bytes: usize,
    ) -> Result<(), KernelError> {
        self.context.enter()?;
        let (to, from) = (to.at(0, bytes)?, from.at(offset, bytes)?);
        let stream = self.context.stream();
        call!(self.context, "a copy", cuMemcpyDtoDAsync_v2(to, from, bytes, stream))
    }

    /// How long the device takes for what `work` launches.
    ///
    /// # Errors
    /// What `work` says; `KernelError::Device` where the device fails.
    pub fn time(
        &self,
        work: &mut dyn FnMut() -> Result<(), KernelError>,
    ) -> Result<Duration, KernelError> {
        let (start, end) = &self.timers;
        start.record(&self.context)?;
        work()?;
        end.record(&self.context)?;
        self.context.wait(end)?;
        end.since(start, &self.context)
    }

    /// Waits until all work so far is done.
    ///
    /// # Errors
    /// `KernelError::Device` where some of it failed, or the device hangs.
    pub fn settle(&self) -> Result<(), KernelError> {
        self.context.settle()
    }

    fn blas(&self) -> MutexGuard<'_, Blas> {
        self.blas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn readings(&self) -> MutexGuard<'_, Readings> {
        self.readings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// cuBLASLt's version, e.g. 13.0.2, and what its products were led around, in words.
    pub fn products(&self) -> (String, Vec<String>) {
        let version = Blas::version();
        let release = format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
        (release, self.blas().told())
    }

    /// How many kernels were loaded when it was opened.
    pub fn kernels(&self) -> usize {
        self.functions.len()
    }

    /// Versions, for reports.
    ///
    /// # Errors
    /// `KernelError::Device` where the driver does not say.
    pub fn driver_version(&self) -> Result<String, KernelError> {
        let version = context::version()?;
        Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
    }
}

impl Driver for Gpu {
    type Memory = Memory;
    type Graph = Graph;
    type Reading = Reading;

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn zeroed(&self, what: &'static str, bytes: usize) -> Result<Memory, KernelError> {
        Memory::zeroed(&self.context, what, bytes)
    }

    fn shared(&self, what: &'static str, bytes: usize) -> Result<Memory, KernelError> {
        Memory::shared(&self.context, what, bytes)
    }

    fn export(&self, memory: &Memory) -> Result<Vec<u8>, KernelError> {
        memory.export()
    }

    fn import(&self, ticket: &[u8]) -> Result<Memory, KernelError> {
        Memory::import(&self.context, ticket)
    }

    fn address(&self, memory: &Memory) -> u64 {
        memory.address()
    }

    fn write(&self, to: &Memory, offset: usize, bytes: &[u8]) -> Result<(), KernelError> {
        self.context.enter_to("writing")?;
        let address = to.at(offset, bytes.len())?;
        let mut uploads = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        uploads.send(&self.context, address, bytes)
    }

    fn write_with(
        &self,
        to: &Memory,
        offset: usize,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), KernelError> {
        self.context.enter_to("writing")?;
        let address = to.at(offset, bytes)?;
        let mut uploads = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        uploads.send_filled(&self.context, address, bytes, fill)
    }

    fn read(&self, to: &mut [u8], from: &Memory, offset: usize) -> Result<(), KernelError> {
        self.context.enter_to("reading")?;
        let address = from.at(offset, to.len())?;
        let mut downloads = self.downloads.lock().unwrap_or_else(PoisonError::into_inner);
        downloads.fetch(&self.context, address, to)
    }

    fn begin_read(
        &self,
        from: &Memory,
        offset: usize,
        bytes: usize,
    ) -> Result<Reading, KernelError> {
        self.context.enter_to("reading")?;
        let address = from.at(offset, bytes)?;
        self.readings().begin(&self.context, address, bytes)
    }

    fn end_read(&self, mut reading: Reading) -> Result<Vec<u8>, KernelError> {
        self.context.enter()?;
        let bytes = reading.wait(&self.context)?;
        self.readings().keep(reading);
        Ok(bytes)
    }

    fn launch(&self, launch: Launch<'_>) -> Result<(), KernelError> {
        self.context.enter()?;
        self.functions.launch(&self.context, launch, self.facts.shared_bytes_max)
    }

    fn gemm(&self, gemm: Gemm) -> Result<(), KernelError> {
        self.context.enter()?;
        let launch = |launch: Launch<'_>| self.launch(launch);
        self.blas().product(&launch, &gemm)
    }

    fn stream(&self) -> Result<*mut c_void, KernelError> {
        self.context.enter()?;
        Ok(self.context.stream().cast())
    }

    fn expect_products(&self, n_k: (usize, usize), is_fp8: bool) -> Result<(), KernelError> {
        self.context.enter()?;
        self.blas().choose(n_k, is_fp8)
    }

    fn captures(&self) -> bool {
        true
    }

    fn begin_capture(&self) -> Result<(), KernelError> {
        graph::begin(&self.context)
    }

    fn end_capture(&self) -> Result<Graph, KernelError> {
        Graph::end(&self.context)
    }

    fn replay(&self, graph: &Graph) -> Result<(), KernelError> {
        graph.launch()
    }
}
