//! One kind of product as cuBLASLt knows it: descriptors, and the algorithms for it.

use super::{
    Asked, asked, blas,
    product::{Input, Product},
};
use crate::{GEMM_WORKSPACE_BYTES, device::context::Context};
use cudarc::cublaslt::sys as lt;
use kernels::KernelError;
use lt::cublasLtMatmulDescAttributes_t as DescAttribute;
use std::{collections::HashMap, ffi::c_void, ptr};

/// cuBLAS's word for a transposed operand.
const TRANSPOSED: i32 = 1;
/// Numbers of rows whose algorithms one plan remembers.
const ROWS_MAX: usize = 1024;

pub(super) type Algorithm = lt::cublasLtMatmulAlgo_t;

/// What products have in common that share a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// A power of two at or above the rows.
    pub rows: usize,
    pub n: usize,
    pub k: usize,
    /// Between rows of the output.
    pub stride: usize,
    pub f32_out: bool,
    pub bias: bool,
    pub input: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Bf16,
    /// e4m3 with a scale for each row of both.
    ScaledFp8,
    /// e4m3 as it is.
    Fp8,
}

impl Shape {
    pub fn of(product: &Product) -> Self {
        let Product { m, n, k, stride, f32_out, .. } = *product;
        let input = match product.input {
            Input::Bf16 => Kind::Bf16,
            Input::Fp8(Some(_)) => Kind::ScaledFp8,
            Input::Fp8(None) => Kind::Fp8,
        };
        let bias = product.bias.is_some();
        Self { rows: m.next_power_of_two(), n, k, stride, f32_out, bias, input }
    }
}

pub(super) struct Plan {
    desc: lt::cublasLtMatmulDesc_t,
    /// The weight, the input, and the output.
    layouts: [lt::cublasLtMatrixLayout_t; 3],
    /// Rows that the layouts say.
    rows: usize,
    /// What was chosen for the power of two; nothing where the library has nothing.
    chosen: Option<Algorithm>,
    /// For each number of rows met so far: what it allows there; nothing where it has nothing.
    of_rows: HashMap<usize, Option<Algorithm>>,
}

impl Plan {
    /// `preferred` is tried before the library's own best guess.
    pub fn new(
        context: &Context,
        handle: lt::cublasLtHandle_t,
        product: &Product,
        preferred: Option<Algorithm>,
    ) -> Result<Self, KernelError> {
        let Shape { rows, n, k, stride, f32_out, bias, input } = Shape::of(product);
        let bf16 = lt::cudaDataType_t::CUDA_R_16BF;
        let f32 = lt::cudaDataType_t::CUDA_R_32F;
        let mut desc = ptr::null_mut();
        let compute = lt::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        blas!(context, "describing a product", cublasLtMatmulDescCreate(&mut desc, compute, f32))?;
        let layouts = [ptr::null_mut(); 3];
        // From here on dropped with whatever it has got so far.
        let mut plan = Self { desc, layouts, rows, chosen: None, of_rows: HashMap::new() };
        plan.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSED)?;
        if bias {
            let epilogue = lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            plan.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue)?;
            let of_bias = DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE;
            plan.set(context, of_bias, bf16)?;
        }
        if input == Kind::ScaledFp8 {
            // One scale a row of each operand, both of which lie as columns here.
            let scales =
                lt::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
            plan.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, scales)?;
            plan.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, scales)?;
        }
        let element = if input == Kind::Bf16 { bf16 } else { lt::cudaDataType_t::CUDA_R_8F_E4M3 };
        let out = if f32_out { f32 } else { bf16 };
        // Each column-major: rows, columns, and the distance of columns.
        let described = [(element, k, n, k), (element, k, rows, k), (out, n, rows, stride)];
        for (layout, (element, rows, cols, stride)) in plan.layouts.iter_mut().zip(described) {
            let what = "describing a matrix";
            let (rows, cols, stride) = (rows as u64, cols as u64, stride as i64);
            blas!(context, what, cublasLtMatrixLayoutCreate(layout, element, rows, cols, stride))?;
        }
        // The library refuses to choose for scales or a bias that are nowhere.
        plan.point(context, product)?;
        plan.chosen = match preferred {
            Some(algorithm) if plan.allows(context, handle, &algorithm)? => Some(algorithm),
            _ => plan.candidates(context, handle, 1)?.first().copied(),
        };
        Ok(plan)
    }

    /// The algorithm for so many rows, which the layouts have from now on: the plan's own where the
    /// library allows it there, else one asked for anew. `None` where the library has none.
    pub fn at(
        &mut self,
        context: &Context,
        handle: lt::cublasLtHandle_t,
        product: &Product,
    ) -> Result<Option<Algorithm>, KernelError> {
        self.set_rows(context, product.m)?;
        self.point(context, product)?;
        if let Some(known) = self.of_rows.get(&product.m) {
            return Ok(*known);
        }
        let algorithm = match self.chosen {
            Some(algorithm) if self.allows(context, handle, &algorithm)? => Some(algorithm),
            _ => self.candidates(context, handle, 1)?.first().copied(),
        };
        self.remember(product.m, algorithm);
        Ok(algorithm)
    }

    /// For these rows there is nothing, whatever was said before.
    pub fn refuse(&mut self, rows: usize) {
        self.remember(rows, None);
    }

    fn remember(&mut self, rows: usize, algorithm: Option<Algorithm>) {
        if self.of_rows.len() == ROWS_MAX {
            self.of_rows.clear();
        }
        self.of_rows.insert(rows, algorithm);
    }

    /// Whether the library takes the algorithm for the rows that the layouts say.
    fn allows(
        &self,
        context: &Context,
        handle: lt::cublasLtHandle_t,
        algorithm: &Algorithm,
    ) -> Result<bool, KernelError> {
        let mut found = nothing_found();
        let [weight, x, out] = self.layouts;
        // SAFETY: handles are alive, and the result has room.
        let status = unsafe {
            lt::cublasLtMatmulAlgoCheck(
                handle, self.desc, weight, x, out, out, algorithm, &mut found,
            )
        };
        let taken = asked(context, "checking an algorithm", status)? == Asked::Done;
        Ok(taken && found.workspaceSize <= GEMM_WORKSPACE_BYTES)
    }

    /// The library's own best guesses for the rows that the layouts say, the best first.
    pub fn candidates(
        &self,
        context: &Context,
        handle: lt::cublasLtHandle_t,
        most: usize,
    ) -> Result<Vec<Algorithm>, KernelError> {
        use lt::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Preference::new(context)?;
        let bytes = GEMM_WORKSPACE_BYTES;
        preference.set(context, Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, bytes)?;
        let none = 0u32;
        preference.set(context, Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, none)?;
        let mut found = vec![nothing_found(); most];
        let mut count = 0;
        let [weight, x, out] = self.layouts;
        // SAFETY: handles are alive, and there is room for as many results as are asked for.
        let status = unsafe {
            lt::cublasLtMatmulAlgoGetHeuristic(
                handle,
                self.desc,
                weight,
                x,
                out,
                out,
                preference.0,
                most as i32,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        if asked(context, "choosing an algorithm", status)? == Asked::Refused {
            return Ok(Vec::new());
        }
        found.truncate(usize::try_from(count).unwrap_or(0));
        found.retain(|found| found.state == lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        Ok(found.into_iter().map(|found| found.algo).collect())
    }

    /// Begins the product that [`Self::at`] or [`Self::new`] was last given.
    pub fn run(
        &self,
        context: &Context,
        (handle, workspace): (lt::cublasLtHandle_t, u64),
        product: &Product,
        algorithm: &Algorithm,
    ) -> Result<Asked, KernelError> {
        let (one, zero) = (1f32, 0f32);
        let scalar = |value: &f32| ptr::from_ref(value).cast::<c_void>();
        let pointer = |address: u64| address as *mut c_void;
        let [weight, x, out] = self.layouts;
        // SAFETY: handles are alive, and addresses point to operands as large as the layouts say.
        let status = unsafe {
            lt::cublasLtMatmul(
                handle,
                self.desc,
                scalar(&one),
                pointer(product.weight),
                weight,
                pointer(product.x),
                x,
                scalar(&zero),
                pointer(product.out),
                out,
                pointer(product.out),
                out,
                algorithm,
                pointer(workspace),
                GEMM_WORKSPACE_BYTES,
                context.stream().cast(),
            )
        };
        asked(context, product, status)
    }

    /// Bias and scales of the next product lie there.
    fn point(&self, context: &Context, product: &Product) -> Result<(), KernelError> {
        if let Some(bias) = product.bias {
            self.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
        }
        if let Input::Fp8(Some(scales)) = product.input {
            let (of_weight, of_x) = (scales.weight, scales.x);
            self.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, of_weight)?;
            self.set(context, DescAttribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, of_x)?;
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

fn nothing_found() -> lt::cublasLtMatmulHeuristicResult_t {
    lt::cublasLtMatmulHeuristicResult_t {
        algo: lt::cublasLtMatmulAlgo_t { data: [0; 8] },
        workspaceSize: 0,
        state: lt::cublasStatus_t::CUBLAS_STATUS_NOT_INITIALIZED,
        wavesCount: 0.0,
        reserved: [0; 4],
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
