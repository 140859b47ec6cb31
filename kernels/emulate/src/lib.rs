//! A CUDA device in software: the kernels of `kernels/cuda`, compiled for the host, under a
//! scheduler of fibers (`simt.cpp`). A tool for tests, not shipped: slow and exact.
//!
//! Device memory is host memory, so that AddressSanitizer sees each access outside it.
//!
//! [`Emulator`] stands in for the driver code of the product; [`machine()`] stands in for NVIDIA's
//! libraries beneath it, for whole processes.

use cuda::{Driver, Facts, Gemm, Launch};
use kernels::KernelError;
use libloading::{Library, Symbol};
use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    collections::HashMap,
    ffi::{CStr, c_char},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

/// The order in which the threads of a block run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    InTurn,
    /// Threads and blocks from the last to the first.
    Backwards,
    /// At every switch another draw.
    Random(u16),
}

impl Schedule {
    fn code(self) -> u32 {
        match self {
            Self::InTurn => 0,
            Self::Backwards => 1,
            Self::Random(seed) => 2 + u32::from(seed),
        }
    }
}

pub mod compile;
mod counts;
mod graph;
mod launch;
mod machine;
mod product;

pub use compile::{ASAN, PLAIN, RACES, Variant, libasan, library};
pub use counts::Counts;
use graph::Capture;
pub use graph::Graph;
use launch::Order;
pub use machine::{machine, on_machine};

/// An emulated device.
pub struct Emulator {
    library: Library,
    schedule: Schedule,
    facts: Facts,
    capture: Capture,
    captures: bool,
    counts: Counts,
}

/// Host memory that plays the device's.
pub struct Memory {
    owned: Arc<Owned>,
    /// Names memory that others may map.
    ticket: Option<u64>,
}

struct Owned {
    start: *mut u8,
    layout: Layout,
    bytes: usize,
}

// SAFETY: the memory is only touched by the driver's calls, which run one after another, and by
// kernels of several devices, which order what they do by flags in it.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        graph::given_back(self.start as u64);
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start, self.layout) };
    }
}

/// What emulated devices of this process may map of each other, by ticket.
static SHARED: Mutex<Option<HashMap<u64, Weak<Owned>>>> = Mutex::new(None);

impl Emulator {
    /// `library` is what [`library()`] made, or one compiled like it.
    ///
    /// # Errors
    /// `KernelError::Device` where it cannot be loaded.
    pub fn load(library: &Path, schedule: Schedule) -> Result<Self, KernelError> {
        // SAFETY: the library's initialisers only list its kernels.
        let library = unsafe { Library::new(library) };
        let library = library.map_err(|error| KernelError::Device(format!("{error:?}")))?;
        let facts = Facts {
            name: "emulated".into(),
            compute_capability: (9, 0),
            multiprocessors: 132,
            shared_bytes_max: 227 << 10,
            memory_bytes: 8 << 30,
        };
        let (capture, counts) = (Capture::default(), Counts::default());
        Ok(Self { library, schedule, facts, capture, captures: true, counts })
    }

    /// As if it were of another generation: (8, 0) is Ampere.
    #[must_use]
    pub fn of_capability(mut self, compute_capability: (u32, u32)) -> Self {
        self.facts.compute_capability = compute_capability;
        self
    }

    /// As if it had another number of multiprocessors than 132.
    #[must_use]
    pub fn of_multiprocessors(mut self, count: u32) -> Self {
        self.facts.multiprocessors = count;
        self
    }

    /// What it was asked to do, from now on and so far.
    pub fn counts(&self) -> Counts {
        self.counts.clone()
    }

    /// The names of all kernels.
    pub fn kernels(&self) -> Vec<String> {
        type NameFn = unsafe extern "C" fn(usize) -> *const c_char;
        // SAFETY: the library exports it with this signature.
        let name: Symbol<'_, NameFn> =
            unsafe { self.library.get(b"simt_kernel\0") }.expect("the emulation exports it");
        let mut names = Vec::new();
        loop {
            // SAFETY: any index may be asked for; past the last one there is null.
            let found = unsafe { name(names.len()) };
            if found.is_null() {
                return names;
            }
            // SAFETY: a string literal.
            names.push(unsafe { CStr::from_ptr(found) }.to_string_lossy().into_owned());
        }
    }
}

fn outside(offset: usize, len: usize, bytes: usize) -> Result<(), KernelError> {
    if offset.checked_add(len).is_some_and(|end| end <= bytes) {
        return Ok(());
    }
    Err(KernelError::Device(format!("{len} bytes at {offset} of an allocation of {bytes}")))
}

impl Driver for Emulator {
    type Memory = Memory;
    type Graph = Graph;
    type Reading = Vec<u8>;

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn zeroed(&self, what: &'static str, bytes: usize) -> Result<Memory, KernelError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        self.capture.refuse("taking memory")?;
        let refused = KernelError::Memory { what, bytes };
        let layout = Layout::from_size_align(bytes.max(1), 256).map_err(|_| refused)?;
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            return Err(KernelError::Memory { what, bytes });
        }
        graph::taken(start as u64, bytes, NEXT.fetch_add(1, Ordering::Relaxed));
        Ok(Memory { owned: Arc::new(Owned { start, layout, bytes }), ticket: None })
    }

    fn shared(&self, what: &'static str, bytes: usize) -> Result<Memory, KernelError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let Memory { owned, .. } = self.zeroed(what, bytes)?;
        let ticket = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut all = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let all = all.get_or_insert_default();
        all.retain(|_, memory| memory.strong_count() > 0);
        all.insert(ticket, Arc::downgrade(&owned));
        Ok(Memory { owned, ticket: Some(ticket) })
    }

    fn export(&self, memory: &Memory) -> Result<Vec<u8>, KernelError> {
        let ticket = memory.ticket.map(|ticket| ticket.to_le_bytes().to_vec());
        ticket.ok_or_else(|| KernelError::Device("memory that is not shared".into()))
    }

    fn import(&self, ticket: &[u8]) -> Result<Memory, KernelError> {
        let all = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let number = ticket.try_into().map(u64::from_le_bytes).ok();
        let found = number.and_then(|number| all.as_ref()?.get(&number)?.upgrade());
        let owned = found.ok_or_else(|| KernelError::Device("memory that is gone".into()))?;
        Ok(Memory { owned, ticket: None })
    }

    fn address(&self, memory: &Memory) -> u64 {
        memory.owned.start as u64
    }

    fn write(&self, to: &Memory, offset: usize, bytes: &[u8]) -> Result<(), KernelError> {
        self.capture.refuse("writing")?;
        self.counts.wrote(bytes.len());
        outside(offset, bytes.len(), to.owned.bytes)?;
        // SAFETY: within the allocation; nobody else touches it during the call.
        unsafe { to.owned.start.add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn read(&self, to: &mut [u8], from: &Memory, offset: usize) -> Result<(), KernelError> {
        self.capture.refuse("reading")?;
        self.counts.read();
        outside(offset, to.len(), from.owned.bytes)?;
        // SAFETY: within the allocation; nobody else touches it during the call.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from.owned.start.add(offset), to.len()) };
        Ok(())
    }

    fn begin_read(
        &self,
        from: &Memory,
        offset: usize,
        bytes: usize,
    ) -> Result<Vec<u8>, KernelError> {
        let mut to = vec![0; bytes];
        self.read(&mut to, from, offset)?;
        Ok(to)
    }

    fn end_read(&self, reading: Vec<u8>) -> Result<Vec<u8>, KernelError> {
        Ok(reading)
    }

    fn launch(&self, launch: Launch<'_>) -> Result<(), KernelError> {
        if self.capture.keeps(&launch) {
            return Ok(());
        }
        self.counts.launched();
        self.begin(&Order::from(&launch), false)?.end()
    }

    fn gemm(&self, gemm: Gemm) -> Result<(), KernelError> {
        if self.capture.keeps_product(&gemm) {
            return Ok(());
        }
        self.counts.launched();
        product::run(&gemm)
    }

    fn captures(&self) -> bool {
        self.captures
    }

    fn begin_capture(&self) -> Result<(), KernelError> {
        self.capture.begin()
    }

    fn end_capture(&self) -> Result<Graph, KernelError> {
        let graph = self.capture.end()?;
        self.counts.has_captured(graph.kernels());
        Ok(graph)
    }

    fn replay(&self, graph: &Graph) -> Result<(), KernelError> {
        self.counts.replayed();
        self.run(graph)
    }
}
