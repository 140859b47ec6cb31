//! A CUDA device in software: the kernels of `kernels/cuda`, compiled for the host, under a
//! scheduler of fibers (`simt.cpp`). A tool for tests, not shipped: slow and exact.
//!
//! Device memory is host memory, so that AddressSanitizer sees each access outside it.

use cuda::{Driver, Facts, Gemm, Launch};
use kernels::KernelError;
use libloading::{Library, Symbol};
use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::Path,
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
mod product;

pub use compile::{ASAN, PLAIN, RACES, Variant, libasan, library};

type LaunchFn = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    u32,
    usize,
    *const c_void,
    usize,
    u32,
    *mut c_char,
    usize,
) -> c_int;

/// An emulated device.
pub struct Emulator {
    library: Library,
    schedule: Schedule,
    facts: Facts,
}

/// Host memory that plays the device's.
pub struct Memory {
    start: *mut u8,
    layout: Layout,
    bytes: usize,
}

// SAFETY: the memory is only touched by the driver's calls, which run one after another.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start, self.layout) };
    }
}

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
        Ok(Self { library, schedule, facts })
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

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn zeroed(&self, what: &'static str, bytes: usize) -> Result<Memory, KernelError> {
        let refused = KernelError::Memory { what, bytes };
        let layout = Layout::from_size_align(bytes.max(1), 256).map_err(|_| refused)?;
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            return Err(KernelError::Memory { what, bytes });
        }
        Ok(Memory { start, layout, bytes })
    }

    fn address(&self, memory: &Memory) -> u64 {
        memory.start as u64
    }

    fn write(&self, to: &Memory, offset: usize, bytes: &[u8]) -> Result<(), KernelError> {
        outside(offset, bytes.len(), to.bytes)?;
        // SAFETY: within the allocation; nobody else touches it during the call.
        unsafe { to.start.add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn read(&self, to: &mut [u8], from: &Memory, offset: usize) -> Result<(), KernelError> {
        outside(offset, to.len(), from.bytes)?;
        // SAFETY: within the allocation; nobody else touches it during the call.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from.start.add(offset), to.len()) };
        Ok(())
    }

    fn launch(&self, launch: Launch<'_>) -> Result<(), KernelError> {
        // SAFETY: the library exports it with this signature.
        let run: Symbol<'_, LaunchFn> = unsafe { self.library.get(b"simt_launch\0") }
            .map_err(|error| KernelError::Device(error.to_string()))?;
        let name = CString::new(launch.kernel)
            .map_err(|_| KernelError::Device("a kernel's name with a zero in it".into()))?;
        let (args, args_len) = launch.args();
        let mut error = [0u8; 1024];
        // SAFETY: the argument struct is alive and as long as said, which the library compares with
        // the kernel's; what its addresses point to is the launcher's promise.
        let code = unsafe {
            run(
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.threads,
                launch.shared as usize,
                args,
                args_len,
                self.schedule.code(),
                error.as_mut_ptr().cast(),
                error.len(),
            )
        };
        if code == 0 {
            return Ok(());
        }
        let text = CStr::from_bytes_until_nul(&error).unwrap_or_default();
        Err(KernelError::Device(text.to_string_lossy().into_owned()))
    }

    fn gemm(&self, gemm: Gemm) -> Result<(), KernelError> {
        product::run(&gemm)
    }
}
