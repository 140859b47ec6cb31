//! Work of the stream that was captured and can be launched as one.

use super::{
    context::{Context, call},
    sys,
};
use kernels::KernelError;
use std::{
    ptr,
    sync::{Arc, atomic::Ordering},
};

/// What was captured, ready to be launched.
pub struct Graph {
    handle: sys::CUgraphExec,
    /// Launches in it.
    kernels: u64,
    context: Arc<Context>,
}

// SAFETY: the driver's handles may be used from any thread, one call at a time, which launches on
// one stream are.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

/// Begins to keep what this thread launches instead of running it.
pub(super) fn begin(context: &Context) -> Result<(), KernelError> {
    context.enter()?;
    context.begin_capture()?;
    let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let begun =
        call!(context, "beginning a capture", cuStreamBeginCapture_v2(context.stream(), mode));
    if begun.is_err() {
        context.end_capture()?;
    }
    begun
}

impl Context {
    /// What is launched from now on is captured.
    fn begin_capture(&self) -> Result<(), KernelError> {
        let before = self.kernels();
        match self.before_capture().replace(before) {
            None => Ok(()),
            Some(_) => Err(KernelError::Device("a capture within another".into())),
        }
    }

    /// Says how many launches were captured.
    fn end_capture(&self) -> Result<u64, KernelError> {
        let before = self.before_capture().take();
        let before = before.ok_or_else(|| KernelError::Device("no capture to end".into()))?;
        Ok(self.kernels.swap(before, Ordering::Relaxed).saturating_sub(before))
    }
}

impl Graph {
    /// Ends what [`begin`] began.
    pub(super) fn end(context: &Arc<Context>) -> Result<Self, KernelError> {
        context.enter()?;
        let kernels = context.end_capture()?;
        let (mut graph, what) = (ptr::null_mut(), "ending a capture");
        call!(context, what, cuStreamEndCapture(context.stream(), &mut graph))?;
        let mut handle = ptr::null_mut();
        let made =
            call!(context, "making a graph", cuGraphInstantiateWithFlags(&mut handle, graph, 0));
        // SAFETY: ended above; what was made of it is a copy.
        let freed = unsafe { sys::cuGraphDestroy(graph) };
        made?;
        let graph = Self { handle, kernels, context: Arc::clone(context) };
        context.check("freeing a graph", freed)?;
        Ok(graph)
    }

    pub(super) fn launch(&self) -> Result<(), KernelError> {
        let context = &self.context;
        context.enter()?;
        context.add_kernels(self.kernels);
        call!(context, "launching a graph", cuGraphLaunch(self.handle, context.stream()))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.settle().is_ok() {
            // SAFETY: its launches are done, and nobody launches it any more.
            let result = unsafe { sys::cuGraphExecDestroy(self.handle) };
            drop(self.context.check("freeing a graph", result));
        }
    }
}
