//! Launches in the library of kernels.

use super::Emulator;
use cuda::Launch;
use kernels::KernelError;
use libloading::Symbol;
use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    ptr::NonNull,
};

/// As `simt::Launch` of `launch.cpp`.
#[repr(C)]
struct Given {
    name: *const c_char,
    grid: *const u32,
    threads: u32,
    shared: usize,
    args: *const c_void,
    args_size: usize,
    schedule: u32,
    dependent: u32,
}

type BeginFn = unsafe extern "C" fn(*const Given, c_int, *mut c_char, usize) -> *mut c_void;
type EndFn = unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int;

/// A launch that waits for its turn. A dependent one may have begun, as far as it comes without
/// those before it.
pub(super) struct Begun<'a> {
    launch: Option<NonNull<c_void>>,
    end: Symbol<'a, EndFn>,
    error: Box<[u8; 1024]>,
}

/// A launch, wherever its argument lies.
pub(super) struct Order<'a> {
    pub name: &'a str,
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared: u32,
    pub dependent: bool,
    pub args: (*const c_void, usize),
}

impl<'a> From<&Launch<'a>> for Order<'a> {
    fn from(launch: &Launch<'a>) -> Self {
        let Launch { kernel, grid, threads, shared, dependent, .. } = *launch;
        Self { name: kernel, grid, threads, shared, dependent, args: launch.args() }
    }
}

impl Emulator {
    /// `ahead`: others stand before it, and a dependent one begins already.
    pub(super) fn begin(&self, order: &Order<'_>, ahead: bool) -> Result<Begun<'_>, KernelError> {
        let missing = |error: libloading::Error| KernelError::Device(error.to_string());
        // SAFETY: the library exports it with this signature.
        let begin: Symbol<'_, BeginFn> =
            unsafe { self.library.get(b"simt_begin\0") }.map_err(missing)?;
        // SAFETY: as above.
        let end = unsafe { self.library.get(b"simt_end\0") }.map_err(missing)?;
        let name = CString::new(order.name)
            .map_err(|_| KernelError::Device("a kernel's name with a zero in it".into()))?;
        let (args, args_size) = order.args;
        let given = Given {
            name: name.as_ptr(),
            grid: order.grid.as_ptr(),
            threads: order.threads,
            shared: order.shared as usize,
            args,
            args_size,
            schedule: self.schedule.code(),
            dependent: u32::from(order.dependent),
        };
        let mut begun = Begun { launch: None, end, error: Box::new([0; 1024]) };
        let (error, len) = (begun.error.as_mut_ptr().cast(), begun.error.len());
        // SAFETY: the argument struct is alive and as long as said, which the library compares with
        // the kernel's, and copies; what its addresses point to is the launcher's promise.
        let started = unsafe { begin(&raw const given, c_int::from(ahead), error, len) };
        begun.launch = NonNull::new(started);
        match begun.launch {
            Some(_) => Ok(begun),
            None => Err(begun.what_was_wrong()),
        }
    }
}

impl Begun<'_> {
    /// Runs it to its end.
    pub fn end(mut self) -> Result<(), KernelError> {
        match self.run() {
            true => Ok(()),
            false => Err(self.what_was_wrong()),
        }
    }

    fn run(&mut self) -> bool {
        let Some(launch) = self.launch.take() else { return true };
        let (error, len) = (self.error.as_mut_ptr().cast(), self.error.len());
        // SAFETY: `begin` made it, and it is ended once.
        unsafe { (self.end)(launch.as_ptr(), error, len) == 0 }
    }

    fn what_was_wrong(&self) -> KernelError {
        let text = CStr::from_bytes_until_nul(&self.error[..]).unwrap_or_default();
        KernelError::Device(text.to_string_lossy().into_owned())
    }
}

impl Drop for Begun<'_> {
    /// One whose turn never comes, behind another that failed: its blocks end somehow.
    fn drop(&mut self) {
        self.run();
    }
}
