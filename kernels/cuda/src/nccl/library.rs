//! NCCL by its C interface, opened at run time: nothing is linked, and its absence is one sentence.
//!
//! The numbers and layouts are those of `nccl.h` from 2.18 on, which later releases keep: the
//! configuration begins with its own size, and the library takes what it knows of it.

use kernels::KernelError;
use libloading::Library;
use std::{
    error::Error,
    ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void},
    ptr,
};

/// Where it is looked for unless told otherwise: a name that distributions and wheels share.
pub const NCCL_LIBRARY: &str = "libnccl.so.2";
/// 2.18: the oldest whose configuration is as below.
const VERSION_MIN: c_int = 21800;
const VERSION_END: c_int = 30000;
const REMEDY: &str = "install libnccl 2.18 or newer, or name the library with --nccl PATH";

pub(super) type Comm = *mut c_void;

/// Bytes by which the ranks of one group find each other; rank 0 makes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId(pub [u8; 128]);

/// `ncclConfig_t` as far as 2.18 has it.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// No call waits for another rank; everything else is the library's choice.
    pub fn unblocking() -> Self {
        const UNSET: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: VERSION_MIN.cast_unsigned(),
            blocking: 0,
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas: UNSET,
            net_name: ptr::null(),
            split_share: UNSET,
        }
    }
}

pub(super) const SUCCESS: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;
pub(super) const FLOAT32: c_int = 7;
pub(super) const BFLOAT16: c_int = 9;
pub(super) const SUM: c_int = 0;

/// Declares the functions and how they are found.
macro_rules! functions {
    ($($name:ident = $symbol:literal : fn($($argument:ty),* $(,)?) -> $result:ty;)*) => {
        /// The library's functions. It is never unloaded: threads of its own run in it, e.g. those
        /// that wait for ranks which do not come.
        #[derive(Clone, Copy)]
        pub struct Nccl {
            version: c_int,
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Nccl {
            fn find(library: &Library, version: c_int) -> Result<Self, libloading::Error> {
                Ok(Self {
                    version,
                    // SAFETY: nccl.h declares it so.
                    $($name: *unsafe { library.get($symbol)? },)*
                })
            }
        }
    };
}

functions! {
    get_unique_id = b"ncclGetUniqueId\0": fn(*mut UniqueId) -> c_int;
    init_rank = b"ncclCommInitRankConfig\0":
        fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int;
    async_error = b"ncclCommGetAsyncError\0": fn(Comm, *mut c_int) -> c_int;
    abort = b"ncclCommAbort\0": fn(Comm) -> c_int;
    all_reduce = b"ncclAllReduce\0":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    send = b"ncclSend\0": fn(*const c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    receive = b"ncclRecv\0": fn(*mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    group_start = b"ncclGroupStart\0": fn() -> c_int;
    group_end = b"ncclGroupEnd\0": fn() -> c_int;
    error_string = b"ncclGetErrorString\0": fn(c_int) -> *const c_char;
    last_error = b"ncclGetLastError\0": fn(Comm) -> *const c_char;
}

impl Nccl {
    /// Opens the library of this name or path.
    ///
    /// # Errors
    /// `KernelError::Device` says what is wrong and what to do: it is missing, of another release
    /// than 2.18 to 2.99, or lacks a function.
    pub fn open(library: &OsStr) -> Result<Self, KernelError> {
        type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
        let name = library.display();
        // SAFETY: loading NCCL runs nothing but its own initialisers.
        let opened = unsafe { Library::new(library) };
        let opened = opened
            .map_err(|error| KernelError::Device(format!("no NCCL ({}); {REMEDY}", why(&error))))?;
        let unfit =
            |error| KernelError::Device(format!("NCCL in {name}: {}; {REMEDY}", why(&error)));
        // SAFETY: every release declares it so.
        let get_version =
            unsafe { opened.get::<GetVersion>(b"ncclGetVersion\0") }.map_err(unfit)?;
        let mut version = 0;
        // SAFETY: only writes the number.
        let result = unsafe { get_version(&mut version) };
        if result != SUCCESS || !(VERSION_MIN..VERSION_END).contains(&version) {
            let found = release(version);
            return Err(KernelError::Device(format!(
                "NCCL in {name} is release {found}; 2.18 to 2.99 are known: {REMEDY}"
            )));
        }
        let found = Self::find(&opened, version).map_err(unfit)?;
        std::mem::forget(opened);
        Ok(found)
    }

    /// As it numbers itself: 2.18.3 is 21803.
    pub fn version(&self) -> i32 {
        self.version
    }

    /// For the ranks of one group; this process answers them while they look for each other.
    ///
    /// # Errors
    /// `KernelError::Device` in the library's words, e.g. without a network interface.
    pub fn unique_id(&self) -> Result<UniqueId, KernelError> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: only writes the bytes.
        let result = unsafe { (self.get_unique_id)(&mut id) };
        match result {
            SUCCESS => Ok(id),
            result => {
                Err(KernelError::Device(self.failed("making an id", result, ptr::null_mut())))
            }
        }
    }

    /// Text of a failure of `comm`, which may be null.
    pub(super) fn failed(&self, what: &str, result: c_int, comm: Comm) -> String {
        // SAFETY: a text that is never freed.
        let name = text(unsafe { (self.error_string)(result) });
        // SAFETY: the communicator is alive or null; the text is the thread's or never freed.
        let last = text(unsafe { (self.last_error)(comm) });
        match last.trim() {
            "" => format!("NCCL: {what}: {name}"),
            last => format!("NCCL: {what}: {name} ({last})"),
        }
    }
}

/// The loader's own words, which are behind the error's.
fn why(error: &libloading::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

/// What the library says, which changes with its next call.
fn text(at: *const c_char) -> String {
    if at.is_null() {
        return String::new();
    }
    // SAFETY: a text with a zero behind it, alive until the library is called again.
    unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned()
}

/// A number of a release in words; up to 2.8 it has a digit less.
fn release(version: c_int) -> String {
    let major = if version < 10_000 { 1000 } else { 10_000 };
    format!("{}.{}.{}", version / major, version % major / 100, version % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_told_as_people_know_them() {
        assert_eq!(release(21803), "2.18.3");
        assert_eq!(release(2708), "2.7.8");
        assert_eq!(release(30001), "3.0.1");
    }

    /// The library takes as many bytes as this says.
    #[test]
    fn the_configuration_is_laid_out_as_that_of_2_18() {
        assert_eq!(size_of::<Config>(), 48);
        assert_eq!(std::mem::offset_of!(Config, blocking), 16);
        assert_eq!(std::mem::offset_of!(Config, net_name), 32);
    }
}
