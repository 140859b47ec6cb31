//! The driver, one device's context, and everything that waits for it.

use super::{
    GpuConfig,
    event::Event,
    patience::{self, Next, Patience},
    retired::Retired,
    sys,
};
use crate::Facts;
use kernels::KernelError;
use std::{
    ffi::{CStr, c_char, c_int},
    fmt::Display,
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use sys::{CUdevice_attribute_enum as Attribute, CUresult};

/// What the calls here need from the driver, whatever compiled the kernels: 12.8.
const VERSION_MIN: c_int = 12080;

/// Calls the driver: `call!(context, what, function(arguments))`.
macro_rules! call {
    ($context:expr, $what:expr, $function:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: the context is current, handles are alive, and pointers point to values of the
        // types that the function takes, for as long as it uses them.
        let result = unsafe { sys::$function($($argument),*) };
        $context.check($what, result)
    }};
}
pub(super) use call;

/// Text of a failure.
fn failed(what: impl Display, result: CUresult) -> String {
    let (mut name, mut text): (*const c_char, *const c_char) = (ptr::null(), ptr::null());
    // SAFETY: both calls only write a pointer to a text that is never freed, or null.
    unsafe {
        sys::cuGetErrorName(result, &mut name);
        sys::cuGetErrorString(result, &mut text);
    }
    let read = |at: *const c_char| match at.is_null() {
        true => "an error without a name".into(),
        // SAFETY: a text of the driver's, alive as long as the process.
        false => unsafe { CStr::from_ptr(at) }.to_string_lossy(),
    };
    format!("{what}: {} ({}){}", read(name), read(text), remedy(result))
}

fn remedy(result: CUresult) -> &'static str {
    match result {
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => {
            "; this build has kernels for compute capability 8.0 and newer"
        }
        CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => "; install a newer NVIDIA driver",
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => "; reload the driver or restart the machine",
        CUresult::CUDA_ERROR_NO_DEVICE => "; look at nvidia-smi and CUDA_VISIBLE_DEVICES",
        CUresult::CUDA_ERROR_ECC_UNCORRECTABLE => "; the device's memory is faulty",
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
        | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
        | CUresult::CUDA_ERROR_LAUNCH_FAILED => {
            "; a fault of a kernel: CUDA_LAUNCH_BLOCKING=1 tells which"
        }
        _ => "",
    }
}

fn started(what: &str, result: CUresult) -> Result<(), KernelError> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        result => Err(KernelError::Device(failed(what, result))),
    }
}

/// Opens the driver, once; every later call needs this one's success.
fn driver() -> Result<(), KernelError> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    let open = || {
        // SAFETY: loading NVIDIA's driver runs nothing but its own initialisers.
        if !unsafe { sys::is_culib_present() } {
            return Err("no CUDA driver: libcuda.so.1 is not on this machine or not where the \
                        loader looks; install NVIDIA's driver, release 580 or newer"
                .to_owned());
        }
        // SAFETY: the library is there, and the flags must be 0.
        let result = unsafe { sys::cuInit(0) };
        started("opening the CUDA driver", result).map_err(plain)?;
        new_enough(version().map_err(plain)?)
    };
    OPENED.get_or_init(open).clone().map_err(KernelError::Device)
}

fn plain(error: KernelError) -> String {
    match error {
        KernelError::Device(text) => text,
        other => other.to_string(),
    }
}

/// The CUDA release that the driver speaks; 13.0 is 13000.
pub(super) fn version() -> Result<c_int, KernelError> {
    let mut version = 0;
    // SAFETY: only writes the number.
    let result = unsafe { sys::cuDriverGetVersion(&mut version) };
    started("asking for the driver's version", result)?;
    Ok(version)
}

/// Machine code runs on drivers of its compiler's major release and newer ones.
fn new_enough(version: c_int) -> Result<(), String> {
    let compiled: c_int = env!("LOCKSTEP_NVCC_RELEASE").parse().unwrap_or(c_int::MAX);
    let least = (compiled / 1000 * 1000).max(VERSION_MIN);
    if version >= least {
        return Ok(());
    }
    let release = |version: c_int| format!("{}.{}", version / 1000, version % 1000 / 10);
    let (has, needs) = (release(version), release(least));
    Err(format!(
        "the CUDA driver is too old: it speaks CUDA {has}, this build needs {needs}; install \
         NVIDIA's driver, release 580 or newer"
    ))
}

/// Devices of this machine, at least one.
pub(super) fn count() -> Result<usize, KernelError> {
    driver()?;
    let mut count = 0;
    // SAFETY: only writes the number.
    started("counting devices", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    match usize::try_from(count) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(KernelError::Device(failed("counting devices", CUresult::CUDA_ERROR_NO_DEVICE))),
    }
}

/// One device, its stream, and whether it still works.
pub(super) struct Context {
    ordinal: usize,
    device: sys::CUdevice,
    handle: sys::CUcontext,
    stream: sys::CUstream,
    wait_limit: Duration,
    first_wait_limit: Duration,
    /// The first failure: all that comes after is refused.
    broken: OnceLock<String>,
    /// The last kernel launched, for messages: failures come later than their cause.
    launched: Mutex<Option<Arc<str>>>,
    /// Kernels launched so far, and those of them that were waited for.
    pub(super) kernels: AtomicU64,
    waited: AtomicU64,
    /// While launches are captured, how many there were before.
    before_capture: Mutex<Option<u64>>,
    patience: Mutex<Patience>,
    retired: Mutex<Retired>,
}

// SAFETY: the driver's handles may be used from any thread, each call making the context current.
unsafe impl Send for Context {}
// SAFETY: as above; the driver serialises calls.
unsafe impl Sync for Context {}

impl Context {
    pub fn open(config: GpuConfig) -> Result<(Self, Facts), KernelError> {
        let count = count()?;
        let GpuConfig { ordinal, wait_limit, first_wait_limit } = config;
        let last = count - 1;
        let index = c_int::try_from(ordinal).ok().filter(|_| ordinal < count).ok_or_else(|| {
            KernelError::Device(format!("there is no device {ordinal}: they are 0 to {last}"))
        })?;
        let mut device = 0;
        // SAFETY: only writes the number.
        started("opening the device", unsafe { sys::cuDeviceGet(&mut device, index) })?;
        let facts = facts(device)?;
        if facts.compute_capability < (8, 0) {
            let (major, minor) = facts.compute_capability;
            return Err(KernelError::Device(format!(
                "{} has compute capability {major}.{minor}; kernels need 8.0 or newer",
                facts.name
            )));
        }
        let mut handle = ptr::null_mut();
        // SAFETY: the device exists; the handle is released when dropped.
        let result = unsafe { sys::cuDevicePrimaryCtxRetain(&mut handle, device) };
        started("making the device's context", result)?;
        let (broken, launched) = (OnceLock::new(), Mutex::new(None));
        let stream = ptr::null_mut();
        let (kernels, waited) = (AtomicU64::new(0), AtomicU64::new(0));
        let (patience, retired) = (Mutex::default(), Mutex::default());
        let mut context = Self {
            ordinal,
            device,
            handle,
            stream,
            wait_limit,
            first_wait_limit,
            broken,
            launched,
            kernels,
            waited,
            before_capture: Mutex::new(None),
            patience,
            retired,
        };
        context.enter()?;
        let mut stream = ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        call!(context, "making a stream", cuStreamCreate(&mut stream, flags))?;
        context.stream = stream;
        Ok((context, facts))
    }

    /// As the driver counts devices.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    pub fn device(&self) -> sys::CUdevice {
        self.device
    }

    /// Nobody uses this memory any more.
    pub fn retire(&self, address: sys::CUdeviceptr, bytes: usize) {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        if retired.put(address, bytes) {
            retired.give_back(self);
        }
    }

    /// Gives back what is not used any more; whether there was anything.
    pub fn give_back(&self) -> bool {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).give_back(self)
    }

    pub fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Makes the context this thread's, where the device still works.
    pub fn enter(&self) -> Result<(), KernelError> {
        if let Some(first) = self.broken.get() {
            let text = format!("device {} is out of use since this: {first}", self.ordinal);
            return Err(KernelError::Device(text));
        }
        // SAFETY: the context lives as long as this value.
        self.check("entering the context", unsafe { sys::cuCtxSetCurrent(self.handle) })
    }

    /// Remembers the first failure.
    pub fn check(&self, what: impl Display, result: CUresult) -> Result<(), KernelError> {
        match result {
            CUresult::CUDA_SUCCESS => Ok(()),
            result => Err(self.fail(failed(what, result))),
        }
    }

    pub fn fail(&self, text: String) -> KernelError {
        let launched = self.launched.lock().unwrap_or_else(PoisonError::into_inner);
        let text = match &*launched {
            Some(kernel) => format!("{text}; the last kernel was {kernel}"),
            None => text,
        };
        KernelError::Device(self.broken.get_or_init(|| text).clone())
    }

    pub fn launched(&self, kernel: &Arc<str>) {
        self.kernels.fetch_add(1, Ordering::Relaxed);
        let mut last = self.launched.lock().unwrap_or_else(PoisonError::into_inner);
        *last = Some(Arc::clone(kernel));
    }

    /// Launched so far.
    pub fn kernels(&self) -> u64 {
        self.kernels.load(Ordering::Relaxed)
    }

    /// So many more were launched as one.
    pub fn add_kernels(&self, kernels: u64) {
        self.kernels.fetch_add(kernels, Ordering::Relaxed);
    }

    pub fn before_capture(&self) -> MutexGuard<'_, Option<u64>> {
        self.before_capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the context this thread's for what cannot be captured.
    pub fn enter_to(&self, what: &str) -> Result<(), KernelError> {
        if self.before_capture().is_some() {
            return Err(KernelError::Device(format!("{what} while launches are captured")));
        }
        self.enter()
    }

    /// Waits until the device has come past `event`.
    pub fn wait(&self, event: &Event) -> Result<(), KernelError> {
        // SAFETY: the event is alive.
        self.poll(event.behind(), || unsafe { sys::cuEventQuery(event.handle) })
    }

    /// As [`Self::wait`], where nothing foretells how long: nothing is learned from it either.
    pub fn wait_awake(&self, event: &Event) -> Result<(), KernelError> {
        // SAFETY: the event is alive.
        self.ask(|| unsafe { sys::cuEventQuery(event.handle) }, Duration::ZERO)
    }

    /// Makes the context this thread's and waits until all work so far is done. Freeing memory,
    /// code or the context also waits for that, without a deadline.
    pub fn settle(&self) -> Result<(), KernelError> {
        self.enter()?;
        // SAFETY: the context is current, and the stream alive.
        self.poll(self.kernels(), || unsafe { sys::cuStreamQuery(self.stream) })
    }

    /// Asks until the answer is another than "not ready", behind so many kernels of all.
    fn poll(&self, behind: u64, query: impl Fn() -> CUresult) -> Result<(), KernelError> {
        let waited = self.waited.fetch_max(behind, Ordering::Relaxed);
        let kernels = u32::try_from(behind.saturating_sub(waited)).unwrap_or(u32::MAX);
        let known = || self.patience.lock().unwrap_or_else(PoisonError::into_inner);
        let expected = known().expected(kernels);
        let start = Instant::now();
        self.ask(query, expected)?;
        known().learn(kernels, start.elapsed());
        Ok(())
    }

    /// Asks until the answer is another than "not ready".
    fn ask(&self, query: impl Fn() -> CUresult, expected: Duration) -> Result<(), KernelError> {
        let limit = if expected.is_zero() { self.first_wait_limit } else { self.wait_limit };
        let start = Instant::now();
        loop {
            match query() {
                CUresult::CUDA_ERROR_NOT_READY => {}
                result => return self.check("running kernels", result),
            }
            let waited = start.elapsed();
            if waited > limit {
                let limit = limit.as_secs_f64();
                return Err(self.fail(format!("the device has not finished within {limit} s")));
            }
            match patience::next(waited, expected) {
                Next::Yield => thread::yield_now(),
                Next::Sleep(time) => thread::sleep(time.min(limit)),
            }
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.give_back();
        // A device that hangs would be waited for; the process is about to end anyway.
        if self.settle().is_err() {
            return;
        }
        if !self.stream.is_null() {
            // SAFETY: nothing uses the stream any more.
            unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
        // SAFETY: retained when opened.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

fn attribute(device: sys::CUdevice, attribute: Attribute) -> Result<u32, KernelError> {
    let mut value = 0;
    // SAFETY: only writes the number.
    let result = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) };
    started("asking about the device", result)?;
    Ok(value.unsigned_abs())
}

fn facts(device: sys::CUdevice) -> Result<Facts, KernelError> {
    let mut name = [0; 128];
    // SAFETY: writes at most as many characters, with a zero behind them.
    let result = unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 128, device) };
    started("asking for the device's name", result)?;
    // SAFETY: the driver ended the text with a zero inside the array.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let mut memory = 0;
    // SAFETY: only writes the number.
    let result = unsafe { sys::cuDeviceTotalMem_v2(&mut memory, device) };
    started("asking for the device's memory", result)?;
    let major = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let shared = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    Ok(Facts {
        name,
        compute_capability: (major, minor),
        multiprocessors: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_max: attribute(device, shared)?,
        memory_bytes: memory as u64,
    })
}
