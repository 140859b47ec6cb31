//! Matrix products by cuBLASLt, opened at run time.
//!
//! Plans (descriptors and the chosen algorithm) are kept for each weight's shape and power of two
//! of rows, so that a step asks for none anew. An algorithm is checked at each number of rows it
//! meets, and another one asked for where the library refuses it there. Algorithms that cut K and
//! add the pieces are excluded: a row's sum would depend on how many rows run beside it.
//!
//! What the library has no algorithm for does not end a step: there are ways around (`detours`),
//! slower, and told to whoever asks.
//!
//! Which of the library's guesses is fastest is measured before a weight is uploaded (`choice`),
//! never in a step, and kept for the process. Products to f32 keep its first guess: a mixture's
//! router is one, which every rank has whole, and all must come to the same bits.
//!
//! Products in e4m3 add up in full f32: the tensor cores' own faster sums, which keep 14 bits, are
//! not asked for.

mod choice;
mod detours;
mod plan;
mod product;

use super::{context::Context, memory::Memory};
use crate::{GEMM_WORKSPACE_BYTES, Gemm, Launch};
use choice::Choices;
use cudarc::cublaslt::sys as lt;
use kernels::KernelError;
use plan::{Plan, Shape};
use product::Product;
use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    ffi::CStr,
    fmt::Display,
    ptr,
    sync::Arc,
};

/// Plans are small; a model has a dozen shapes.
const PLANS_MAX: usize = 4096;
/// Ways around that are told.
const TOLD_MAX: usize = 64;

/// Calls cuBLASLt: `blas!(context, what, function(arguments))`.
macro_rules! blas {
    ($context:expr, $what:expr, $function:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: handles are alive, and pointers point to values of the types and sizes that the
        // function takes, for as long as it uses them.
        let status = unsafe { lt::$function($($argument),*) };
        $crate::device::blas::checked($context, $what, status)
    }};
}
use blas;

/// What became of a question that the library may say no to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Done,
    /// It has nothing for this, and the device is as it was.
    Refused,
}

fn asked(
    context: &Context,
    what: impl Display,
    status: lt::cublasStatus_t,
) -> Result<Asked, KernelError> {
    use lt::cublasStatus_t as Status;
    match status {
        Status::CUBLAS_STATUS_NOT_SUPPORTED
        | Status::CUBLAS_STATUS_INVALID_VALUE
        | Status::CUBLAS_STATUS_ARCH_MISMATCH => Ok(Asked::Refused),
        status => checked(context, what, status).map(|()| Asked::Done),
    }
}

fn checked(
    context: &Context,
    what: impl Display,
    status: lt::cublasStatus_t,
) -> Result<(), KernelError> {
    use lt::cublasStatus_t as Status;
    if status == Status::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    // SAFETY: a text that is never freed.
    let text = unsafe { CStr::from_ptr(lt::cublasLtGetStatusString(status)) };
    let text = format!("cuBLASLt: {what}: {}", text.to_string_lossy());
    Err(match status {
        Status::CUBLAS_STATUS_EXECUTION_FAILED
        | Status::CUBLAS_STATUS_INTERNAL_ERROR
        | Status::CUBLAS_STATUS_MAPPING_ERROR => context.fail(text),
        // A product that the library does not know leaves the device as it was.
        _ => KernelError::Device(text),
    })
}

/// Launches a kernel in the stream of the products.
pub(super) type Launcher<'a> = &'a dyn Fn(Launch<'_>) -> Result<(), KernelError>;

/// cuBLASLt for one device.
pub(super) struct Blas {
    handle: lt::cublasLtHandle_t,
    workspace: Memory,
    /// What ways around need; made by the first of them.
    scratch: Option<Memory>,
    plans: HashMap<Shape, Plan>,
    choices: Choices,
    /// Ways around that were taken.
    told: BTreeSet<String>,
    context: Arc<Context>,
}

// SAFETY: the handles may be used from any thread, one at a time.
unsafe impl Send for Blas {}

impl Blas {
    pub fn open(context: &Arc<Context>) -> Result<Self, KernelError> {
        // SAFETY: loading the library runs nothing but its own initialisers.
        if !unsafe { lt::is_culib_present() } {
            return Err(KernelError::Device(
                "no cuBLASLt: libcublasLt.so.13 (or .12) is not where the loader looks; install \
                 CUDA's libcublas, or name its folder in LD_LIBRARY_PATH"
                    .into(),
            ));
        }
        let workspace = Memory::zeroed(context, "the matrix product", GEMM_WORKSPACE_BYTES)?;
        let mut handle = ptr::null_mut();
        blas!(context, "opening", cublasLtCreate(&mut handle))?;
        let (plans, told) = (HashMap::new(), BTreeSet::new());
        let (scratch, choices) = (None, Choices::default());
        let context = Arc::clone(context);
        Ok(Self { handle, workspace, scratch, plans, choices, told, context })
    }

    /// The library's release: 13.0.2 is 130002.
    pub fn version() -> usize {
        // SAFETY: the library is there, or nothing would have been opened.
        unsafe { lt::cublasLtGetVersion() }
    }

    /// Row-major out = x · weightᵀ is column-major outᵀ = weight · xᵀ, and every matrix here is
    /// column-major when read as its transpose.
    pub fn product(&mut self, launch: Launcher<'_>, gemm: &Gemm) -> Result<(), KernelError> {
        if gemm.m == 0 || gemm.n == 0 {
            return Ok(());
        }
        let product = Product::of(gemm);
        match self.whole(&product)? {
            Asked::Done => Ok(()),
            Asked::Refused => self.around(launch, &product),
        }
    }

    /// Ways around a refusal that were taken so far, in words.
    pub fn told(&self) -> Vec<String> {
        self.told.iter().cloned().collect()
    }

    /// By one call of the library.
    fn whole(&mut self, product: &Product) -> Result<Asked, KernelError> {
        if self.plans.len() == PLANS_MAX {
            self.plans.clear();
        }
        let (context, handle) = (&*self.context, self.handle);
        let shape = Shape::of(product);
        let plan = match self.plans.entry(shape) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let preferred = self.choices.of(&shape);
                entry.insert(Plan::new(context, handle, product, preferred)?)
            }
        };
        let Some(algorithm) = plan.at(context, handle, product)? else {
            return Ok(Asked::Refused);
        };
        let asked = plan.run(context, (handle, self.workspace.address()), product, &algorithm)?;
        if asked == Asked::Refused {
            plan.refuse(product.m);
        }
        Ok(asked)
    }

    /// Addresses of three regions of `detours::REGION_BYTES` each.
    fn scratch(&mut self) -> Result<[u64; 3], KernelError> {
        let scratch = match self.scratch.take() {
            Some(scratch) => scratch,
            None => Memory::zeroed(
                &self.context,
                "products that cuBLASLt refuses",
                3 * detours::REGION_BYTES,
            )?,
        };
        let first = scratch.address();
        self.scratch = Some(scratch);
        Ok([0, 1, 2].map(|at| first + (at * detours::REGION_BYTES) as u64))
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.clear();
        // The call waits for the device. Where that hangs, the process's end gives all back.
        if self.context.settle().is_ok() {
            // SAFETY: made by cublasLtCreate; no plan uses it.
            unsafe { lt::cublasLtDestroy(self.handle) };
        }
    }
}
