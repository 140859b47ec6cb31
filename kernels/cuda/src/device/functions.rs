//! The kernels embedded in this binary, by name.

use super::{
    context::{Context, call},
    sys,
};
use crate::Launch;
use kernels::KernelError;
use std::{
    collections::HashMap,
    ffi::CStr,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// A fat binary must start at a multiple of 16.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

/// Machine code for each target, and PTX for what comes after them.
static KERNELS: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("LOCKSTEP_FATBIN")));

/// Shared memory that a block gets without being allowed more.
const SHARED_BYTES_DEFAULT: u32 = 48 << 10;

struct Function {
    name: Arc<str>,
    handle: sys::CUfunction,
    args_bytes: usize,
    /// Whether it may take all the shared memory there is.
    large: AtomicBool,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// Every kernel of one context.
pub(super) struct Functions {
    by_name: HashMap<Arc<str>, Function>,
    module: sys::CUmodule,
    context: Arc<Context>,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Functions {}
// SAFETY: as above.
unsafe impl Sync for Functions {}

impl Functions {
    pub fn load(context: &Arc<Context>) -> Result<Self, KernelError> {
        context.enter()?;
        let mut module = ptr::null_mut();
        let image = KERNELS.0.as_ptr().cast();
        call!(context, "loading the kernels", cuModuleLoadData(&mut module, image))?;
        let context = Arc::clone(context);
        let mut functions = Self { by_name: HashMap::new(), module, context };
        for handle in functions.handles()? {
            let function = functions.describe(handle)?;
            functions.by_name.insert(Arc::clone(&function.name), function);
        }
        Ok(functions)
    }

    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    fn handles(&self) -> Result<Vec<sys::CUfunction>, KernelError> {
        let (context, module, what) = (&self.context, self.module, "listing the kernels");
        let mut count = 0;
        call!(context, what, cuModuleGetFunctionCount(&mut count, module))?;
        let mut handles = vec![ptr::null_mut(); count as usize];
        call!(context, what, cuModuleEnumerateFunctions(handles.as_mut_ptr(), count, module))?;
        Ok(handles)
    }

    fn describe(&self, handle: sys::CUfunction) -> Result<Function, KernelError> {
        let (context, what) = (&self.context, "asking about a kernel");
        let mut name = ptr::null();
        call!(context, what, cuFuncGetName(&mut name, handle))?;
        if name.is_null() {
            return Err(KernelError::Device("a kernel without a name".into()));
        }
        // SAFETY: a text of the module's, which outlives this.
        let name: Arc<str> = unsafe { CStr::from_ptr(name) }.to_string_lossy().into();
        let (mut offset, mut args_bytes) = (0, 0);
        call!(context, what, cuFuncGetParamInfo(handle, 0, &mut offset, &mut args_bytes))?;
        // The driver loads code at its first launch otherwise, and waits for the device to be idle:
        // in a step, and for ever behind a kernel that waits for another device's.
        call!(context, format_args!("loading {name}"), cuFuncLoad(handle))?;
        Ok(Function { name, handle, args_bytes, large: AtomicBool::new(false) })
    }

    pub fn launch(
        &self,
        context: &Context,
        launch: Launch<'_>,
        shared_bytes_max: u32,
    ) -> Result<(), KernelError> {
        let name = launch.kernel;
        let refused = |why: String| Err(KernelError::Device(format!("kernel {name}: {why}")));
        let Some(function) = self.by_name.get(name) else {
            return refused("this build has none of the name".into());
        };
        let (args, args_bytes) = launch.args();
        if args_bytes != function.args_bytes {
            let takes = function.args_bytes;
            return refused(format!("it takes {takes} bytes of arguments, not {args_bytes}"));
        }
        let Launch { shared, threads, grid: [x, y, z], .. } = launch;
        if shared > shared_bytes_max {
            let text =
                format!("{shared} bytes of shared memory; the device has {shared_bytes_max}");
            return refused(text);
        }
        let what = format_args!("launching {name} on {x}×{y}×{z} blocks of {threads}");
        if shared > SHARED_BYTES_DEFAULT && !function.large.load(Ordering::Relaxed) {
            let most =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = shared_bytes_max.cast_signed();
            call!(context, what, cuFuncSetAttribute(function.handle, most, bytes))?;
            function.large.store(true, Ordering::Relaxed);
        }
        context.launched(&function.name);
        let mut overlap = overlap();
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: context.stream(),
            attrs: &raw mut overlap,
            numAttrs: u32::from(launch.dependent),
        };
        let mut params = [args.cast_mut()];
        let (params, extra) = (params.as_mut_ptr(), ptr::null_mut());
        call!(context, what, cuLaunchKernelEx(&raw const config, function.handle, params, extra))
    }
}

/// What lets a launch begin before the one before it is done.
fn overlap() -> sys::CUlaunchAttribute {
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    value.programmaticStreamSerializationAllowed = 1;
    let id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    sys::CUlaunchAttribute { id, pad: [0; 4], value }
}

impl Drop for Functions {
    fn drop(&mut self) {
        if self.context.settle().is_ok() {
            // SAFETY: nothing launches from it any more, and what was launched is done.
            let result = unsafe { sys::cuModuleUnload(self.module) };
            drop(self.context.check("unloading the kernels", result));
        }
    }
}
