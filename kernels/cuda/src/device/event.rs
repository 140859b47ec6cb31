//! Points in a stream: to wait for, and to measure between.

use super::{
    context::{Context, call},
    sys,
};
use kernels::KernelError;
use std::{
    ptr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// A point in the stream.
pub(super) struct Event {
    pub(super) handle: sys::CUevent,
    /// Kernels that were launched before it, of all.
    behind: AtomicU64,
    context: Arc<Context>,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// To wait for.
    pub fn new(context: &Arc<Context>) -> Result<Self, KernelError> {
        Self::with(context, sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32)
    }

    /// To measure with.
    pub fn timed(context: &Arc<Context>) -> Result<Self, KernelError> {
        Self::with(context, sys::CUevent_flags_enum::CU_EVENT_DEFAULT as u32)
    }

    fn with(context: &Arc<Context>, flags: u32) -> Result<Self, KernelError> {
        context.enter()?;
        let mut handle = ptr::null_mut();
        call!(context, "making an event", cuEventCreate(&mut handle, flags))?;
        Ok(Self { handle, behind: AtomicU64::new(0), context: Arc::clone(context) })
    }

    /// Places it behind all work so far.
    pub fn record(&self, context: &Context) -> Result<(), KernelError> {
        context.enter()?;
        self.behind.store(context.kernels(), Relaxed);
        call!(context, "recording an event", cuEventRecord(self.handle, context.stream()))
    }

    /// Kernels that were launched before it, of all.
    pub fn behind(&self) -> u64 {
        self.behind.load(Relaxed)
    }

    /// The device's time between two events that it has passed.
    pub fn since(&self, start: &Self, context: &Context) -> Result<Duration, KernelError> {
        let mut milliseconds: f32 = 0.0;
        let (from, to) = (start.handle, self.handle);
        call!(context, "reading a timer", cuEventElapsedTime_v2(&mut milliseconds, from, to))?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: nobody waits for it any more.
            unsafe { sys::cuEventDestroy_v2(self.handle) };
        }
    }
}
