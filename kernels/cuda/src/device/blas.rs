//! Matrix products by cuBLASLt, opened at run time.
//!
//! Plans (descriptors and the chosen algorithm) are kept for each weight's shape and power of two
//! of rows, so that a step asks for none anew. Algorithms that cut K and add the pieces are
//! excluded: a row's sum would depend on how many rows run beside it.
//!
//! Products in e4m3 add up in full f32: the tensor cores' own faster sums, which keep 14 bits, are
//! not asked for.

use super::{context::Context, memory::Memory};
use crate::{Element, GEMM_WORKSPACE_BYTES, Gemm, Scales};
use cudarc::cublaslt::sys as lt;
use kernels::KernelError;
use lt::cublasLtMatmulDescAttributes_t as DescAttribute;
use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::{CStr, c_void},
    fmt::Display,
    mem::MaybeUninit,
    ptr,
    sync::Arc,
};

/// cuBLAS's word for a transposed operand.
const TRANSPOSED: i32 = 1;
/// Plans are small; a model has a dozen shapes.
const PLANS_MAX: usize = 4096;

/// Calls cuBLASLt: `blas!(context, what, function(arguments))`.
macro_rules! blas {
    ($context:expr, $what:expr, $function:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: handles are alive, and pointers point to values of the types and sizes that the
        // function takes, for as long as it uses them.
        let status = unsafe { lt::$function($($argument),*) };
        checked($context, $what, status)
    }};
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

/// What products have in common that can share a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    /// A power of two at or above the rows.
    rows: usize,
    n: usize,
    k: usize,
    f32_out: bool,
    bias: bool,
    fp8: bool,
}

struct Plan {
    desc: lt::cublasLtMatmulDesc_t,
    /// The weight, the input, and the output.
    layouts: [lt::cublasLtMatrixLayout_t; 3],
    /// Rows that the layouts say.
    rows: usize,
    algorithm: lt::cublasLtMatmulAlgo_t,
}

/// cuBLASLt for one device.
pub(super) struct Blas {
    handle: lt::cublasLtHandle_t,
    workspace: Memory,
    plans: HashMap<Shape, Plan>,
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
        Ok(Self { handle, workspace, plans: HashMap::new(), context: Arc::clone(context) })
    }

    /// Row-major out = x · weightᵀ is column-major outᵀ = weight · xᵀ, and every matrix here is
    /// column-major when read as its transpose.
    pub fn product(&mut self, context: &Context, gemm: Gemm) -> Result<(), KernelError> {
        let Gemm { m, n, k, .. } = gemm;
        if m == 0 || n == 0 {
            return Ok(());
        }
        let f32_out = gemm.out_element == Element::F32;
        let rows = m.next_power_of_two();
        let (bias, fp8) = (gemm.bias.is_some(), gemm.scales.is_some());
        let shape = Shape { rows, n, k, f32_out, bias, fp8 };
        let what = format_args!("a product of {m} rows by [{n}, {k}]");
        if self.plans.len() == PLANS_MAX {
            self.plans.clear();
        }
        let plan = match self.plans.entry(shape) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Plan::new(context, self.handle, shape, &gemm)?),
        };
        plan.set_rows(context, m)?;
        plan.point(context, &gemm)?;
        let (one, zero) = (1f32, 0f32);
        let scalar = |value: &f32| ptr::from_ref(value).cast::<c_void>();
        let pointer = |address: u64| address as *mut c_void;
        let [weight, x, out] = plan.layouts;
        let workspace = pointer(self.workspace.address());
        blas!(
            context,
            what,
            cublasLtMatmul(
                self.handle,
                plan.desc,
                scalar(&one),
                pointer(gemm.weight),
                weight,
                pointer(gemm.x),
                x,
                scalar(&zero),
                pointer(gemm.out),
                out,
                pointer(gemm.out),
                out,
                &plan.algorithm,
                workspace,
                GEMM_WORKSPACE_BYTES,
                context.stream().cast(),
            )
        )
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

impl Plan {
    fn new(
        context: &Context,
        handle: lt::cublasLtHandle_t,
        shape: Shape,
        gemm: &Gemm,
    ) -> Result<Self, KernelError> {
        let Shape { rows, n, k, f32_out, bias, fp8 } = shape;
        let bf16 = lt::cudaDataType_t::CUDA_R_16BF;
        let f32 = lt::cudaDataType_t::CUDA_R_32F;
        let mut desc = ptr::null_mut();
        let compute = lt::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        blas!(context, "describing a product", cublasLtMatmulDescCreate(&mut desc, compute, f32))?;
        let layouts = [ptr::null_mut(); 3];
        let algorithm = lt::cublasLtMatmulAlgo_t { data: [0; 8] };
        // From here on dropped with whatever it has got so far.
        let mut plan = Self { desc, layouts, rows, algorithm };
        plan.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSED)?;
        if bias {
            let epilogue = lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            plan.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue)?;
            let of_bias = DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE;
            plan.set(context, of_bias, bf16)?;
        }
        if fp8 {
            // One scale a row of each operand, both of which lie as columns here.
            let scales =
                lt::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
            plan.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, scales)?;
            plan.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, scales)?;
        }
        let input = if fp8 { lt::cudaDataType_t::CUDA_R_8F_E4M3 } else { bf16 };
        let out = if f32_out { f32 } else { bf16 };
        // Each column-major: rows, columns, and the distance of columns.
        let described = [(input, k, n, k), (input, k, rows, k), (out, n, rows, n)];
        for (layout, (element, rows, cols, stride)) in plan.layouts.iter_mut().zip(described) {
            let what = "describing a matrix";
            let (rows, cols, stride) = (rows as u64, cols as u64, stride as i64);
            blas!(context, what, cublasLtMatrixLayoutCreate(layout, element, rows, cols, stride))?;
        }
        // The library refuses to choose for scales or a bias that are nowhere.
        plan.point(context, gemm)?;
        plan.algorithm = plan.choose(context, handle, shape)?;
        Ok(plan)
    }

    /// The library's own best guess.
    fn choose(
        &self,
        context: &Context,
        handle: lt::cublasLtHandle_t,
        shape: Shape,
    ) -> Result<lt::cublasLtMatmulAlgo_t, KernelError> {
        use lt::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Preference::new(context)?;
        let bytes = GEMM_WORKSPACE_BYTES;
        preference.set(context, Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, bytes)?;
        let none = 0u32;
        preference.set(context, Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, none)?;
        let mut found: MaybeUninit<lt::cublasLtMatmulHeuristicResult_t> = MaybeUninit::zeroed();
        let mut count = 0;
        let [weight, x, out] = self.layouts;
        let desc = self.desc;
        blas!(
            context,
            format_args!("choosing an algorithm for {shape:?}"),
            cublasLtMatmulAlgoGetHeuristic(
                handle,
                desc,
                weight,
                x,
                out,
                out,
                preference.0,
                1,
                found.as_mut_ptr(),
                &mut count,
            )
        )?;
        // SAFETY: zeros are a result too, and the library has written over them what it found.
        let found = unsafe { found.assume_init() };
        if count == 0 || found.state != lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
            let hint = if shape.fp8 { "; products in fp8 take cuBLASLt 12.9 or later" } else { "" };
            let text = format!("cuBLASLt has no algorithm for {shape:?}{hint}");
            return Err(KernelError::Device(text));
        }
        Ok(found.algo)
    }

    /// Bias and scales of the next product lie there.
    fn point(&self, context: &Context, gemm: &Gemm) -> Result<(), KernelError> {
        if let Some(bias) = gemm.bias {
            self.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
        }
        if let Some(Scales { x, weight }) = gemm.scales {
            self.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, weight)?;
            self.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x)?;
        }
        Ok(())
    }

    fn set<T>(
        &self,
        context: &Context,
        attribute: DescAttribute,
        value: T,
    ) -> Result<(), KernelError> {
        let (at, bytes) = (ptr::from_ref(&value).cast(), size_of::<T>());
        let what = "describing a product";
        blas!(context, what, cublasLtMatmulDescSetAttribute(self.desc, attribute, at, bytes))
    }

    /// Input and output have this many rows from now on.
    fn set_rows(&mut self, context: &Context, rows: usize) -> Result<(), KernelError> {
        if self.rows == rows {
            return Ok(());
        }
        let cols = lt::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_COLS;
        let value = rows as u64;
        let (at, bytes) = (ptr::from_ref(&value).cast(), size_of::<u64>());
        for layout in &self.layouts[1..] {
            let what = "describing a matrix";
            blas!(context, what, cublasLtMatrixLayoutSetAttribute(*layout, cols, at, bytes))?;
        }
        self.rows = rows;
        Ok(())
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        for layout in self.layouts.iter().filter(|layout| !layout.is_null()) {
            // SAFETY: made by cublasLtMatrixLayoutCreate, and used by nobody else.
            unsafe { lt::cublasLtMatrixLayoutDestroy(*layout) };
        }
        // SAFETY: made by cublasLtMatmulDescCreate, and used by nobody else.
        unsafe { lt::cublasLtMatmulDescDestroy(self.desc) };
    }
}

/// What an algorithm may do.
struct Preference(lt::cublasLtMatmulPreference_t);

impl Preference {
    fn new(context: &Context) -> Result<Self, KernelError> {
        let mut preference = ptr::null_mut();
        let what = "asking for an algorithm";
        blas!(context, what, cublasLtMatmulPreferenceCreate(&mut preference))?;
        Ok(Self(preference))
    }

    fn set<T>(
        &self,
        context: &Context,
        attribute: lt::cublasLtMatmulPreferenceAttributes_t,
        value: T,
    ) -> Result<(), KernelError> {
        let (at, bytes) = (ptr::from_ref(&value).cast(), size_of::<T>());
        let what = "asking for an algorithm";
        blas!(context, what, cublasLtMatmulPreferenceSetAttribute(self.0, attribute, at, bytes))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by cublasLtMatmulPreferenceCreate, and used by nobody else.
        unsafe { lt::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}
