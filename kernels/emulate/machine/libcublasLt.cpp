// cuBLASLt's products in host memory, as `libcublasLt.so.13` is to the product: plain sums in f32
// in the order of K, as the emulation's own. It refuses what NVIDIA's documentation refuses, and
// computes where the stream comes to it.
//
// The environment says how it misbehaves: FAKE_ALGORITHMS=exact makes an algorithm good for no
// other number of rows than it was chosen for; FAKE_REFUSES lists, with commas between, what there
// are no algorithms for: "bias", "scales" (vectors of them), "fp8", "rows:N" (products of N rows);
// FAKE_CANDIDATES (1) is how many algorithms there are, all alike.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Of the fake driver, which the product has opened.
extern "C" int cuLaunchHostFunc(void* stream, void (*call)(void*), void* data);
extern "C" int cuMemGetAddressRange_v2(unsigned long long* start, size_t* bytes,
                                       unsigned long long at);

namespace {

enum Status : int { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum Type : int { F32 = 0, BF16 = 14, E4M3 = 28 };
enum : int { COMPUTE_F32 = 68, TRANSPOSED = 1, EPILOGUE_NONE = 1, EPILOGUE_BIAS = 4 };
enum : int { SCALE_ONE = 0, SCALE_ROWS = 3 };

using Pointer = const void*;

struct Desc {
    int compute, scale_type;
    int transposed_a = 0, transposed_b = 0, epilogue = EPILOGUE_NONE, bias_type = -1;
    int scale_a = SCALE_ONE, scale_b = SCALE_ONE;
    int8_t fast_sums = 0;
    Pointer bias = nullptr, scales_a = nullptr, scales_b = nullptr;
};

// Column-major, columns `stride` apart.
struct Layout {
    int type;
    uint64_t rows, cols;
    int64_t stride;
};

// Of an algorithm's 64 bytes.
struct Algorithm {
    uint64_t mark, candidate, rows, n, k, kind;
    uint64_t unused[2];
};
constexpr uint64_t MARK = 0x616c676f72697468;

struct Found {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Found) == 96, "cublasLtMatmulHeuristicResult_t");

bool is_fp8(const Layout* a) { return a->type == E4M3; }

bool refuses(const std::string& what) {
    const char* text = getenv("FAKE_REFUSES");
    return text && ("," + std::string(text) + ",").find("," + what + ",") != std::string::npos;
}

struct Product {
    const Desc* desc;
    const Layout *a, *b, *c, *d;

    uint64_t m() const { return b->cols; }
    uint64_t n() const { return a->cols; }
    uint64_t k() const { return a->rows; }
    uint64_t kind() const {
        return static_cast<uint64_t>(a->type) | static_cast<uint64_t>(d->type) << 8 |
               static_cast<uint64_t>(desc->epilogue) << 16 |
               static_cast<uint64_t>(desc->scale_a) << 24;
    }
};

// What its documentation has no row for in the tables of types, layouts and scales.
int check_types(const Product& p) {
    const Desc& desc = *p.desc;
    const bool out = p.d->type == BF16 || p.d->type == F32;
    if (desc.compute != COMPUTE_F32 || desc.scale_type != F32 || p.a->type != p.b->type || !out)
        return NOT_SUPPORTED;
    // Products in fp8 take a transposed A alone; no other product is asked for either.
    if (desc.transposed_a != TRANSPOSED || desc.transposed_b) return NOT_SUPPORTED;
    if (desc.epilogue == EPILOGUE_BIAS) {
        const int wanted = is_fp8(p.a) ? BF16 : p.d->type;
        if (desc.bias_type != wanted) return NOT_SUPPORTED;
        if (desc.bias == nullptr) return INVALID_VALUE;
    } else if (desc.epilogue != EPILOGUE_NONE) {
        return NOT_SUPPORTED;
    }
    if (!is_fp8(p.a)) return p.a->type == BF16 ? SUCCESS : NOT_SUPPORTED;
    const char* major = getenv("FAKE_MAJOR");
    if (major && std::atoi(major) < 9) return NOT_SUPPORTED;
    if (p.n() % 16 || p.k() % 16) return NOT_SUPPORTED;
    if (desc.scale_a != desc.scale_b) return NOT_SUPPORTED;
    if (desc.scale_a == SCALE_ONE) return SUCCESS;
    // Vectors of scales are Hopper's alone.
    if (desc.scale_a != SCALE_ROWS || (major && std::atoi(major) != 9)) return NOT_SUPPORTED;
    return desc.scales_a && desc.scales_b ? SUCCESS : INVALID_VALUE;
}

int check(const Product& p) {
    const bool shapes = p.b->rows == p.k() && p.d->rows == p.n() && p.d->cols == p.m() &&
                        p.c->rows == p.n() && p.c->cols == p.m() && p.c->type == p.d->type;
    const auto long_enough = [](const Layout* l) {
        return l->stride >= static_cast<int64_t>(l->rows);
    };
    if (!shapes || !long_enough(p.a) || !long_enough(p.b) || !long_enough(p.d) || p.m() == 0)
        return INVALID_VALUE;
    if (const int status = check_types(p)) return status;
    if (is_fp8(p.a) && refuses("fp8")) return NOT_SUPPORTED;
    if (p.desc->scale_a == SCALE_ROWS && refuses("scales")) return NOT_SUPPORTED;
    if (p.desc->epilogue == EPILOGUE_BIAS && refuses("bias")) return NOT_SUPPORTED;
    return refuses("rows:" + std::to_string(p.m())) ? NOT_SUPPORTED : SUCCESS;
}

int check_algorithm(const Product& p, const Algorithm& chosen) {
    const bool mine = chosen.mark == MARK && chosen.n == p.n() && chosen.k == p.k() &&
                      chosen.kind == p.kind();
    if (!mine) return INVALID_VALUE;
    const char* which = getenv("FAKE_ALGORITHMS");
    const bool exact = which && std::strcmp(which, "exact") == 0;
    return exact && chosen.rows != p.m() ? NOT_SUPPORTED : SUCCESS;
}

float bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    return std::memcpy(&value, &wide, 4), value;
}

uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float e4m3(uint8_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    uint32_t nan = 0x7fc00000;
    float value;
    std::memcpy(&value, &nan, 4);
    if (exponent == 0) value = static_cast<float>(mantissa) * 0x1p-9f;
    else if (exponent != 15 || mantissa != 7)
        value = static_cast<float>(8 + mantissa) * static_cast<float>(1 << exponent) * 0x1p-10f;
    return code & 0x80 ? -value : value;
}

// A product on its way: descriptors may change once it is asked for.
struct Job {
    Desc desc;
    Layout a, b, d;
    float alpha;
    Pointer x, y;
    void* out;
};

std::vector<float> widened(Pointer from, const Layout& layout) {
    std::vector<float> all;
    all.reserve(layout.rows * layout.cols);
    for (uint64_t col = 0; col < layout.cols; ++col) {
        const uint64_t first = col * static_cast<uint64_t>(layout.stride);
        for (uint64_t at = first; at < first + layout.rows; ++at)
            all.push_back(layout.type == E4M3 ? e4m3(static_cast<const uint8_t*>(from)[at])
                                              : bf16(static_cast<const uint16_t*>(from)[at]));
    }
    return all;
}

float scale(const Desc& desc, Pointer scales, uint64_t at) {
    if (scales == nullptr) return 1.0f;
    return static_cast<const float*>(scales)[desc.scale_a == SCALE_ROWS ? at : 0];
}

void run(void* data) {
    const auto* job = static_cast<Job*>(data);
    const uint64_t n = job->a.cols, m = job->b.cols, k = job->a.rows;
    const std::vector<float> a = widened(job->x, job->a), b = widened(job->y, job->b);
    const auto* bias = static_cast<const uint16_t*>(job->desc.bias);
    for (uint64_t col = 0; col < m; ++col) {
        for (uint64_t row = 0; row < n; ++row) {
            float sum = 0;
            for (uint64_t i = 0; i < k; ++i) sum += b[col * k + i] * a[row * k + i];
            sum = sum * job->alpha * scale(job->desc, job->desc.scales_b, col) *
                  scale(job->desc, job->desc.scales_a, row);
            if (job->desc.epilogue == EPILOGUE_BIAS) sum += bf16(bias[row]);
            const uint64_t at = col * static_cast<uint64_t>(job->d.stride) + row;
            if (job->d.type == F32) static_cast<float*>(job->out)[at] = sum;
            else static_cast<uint16_t*>(job->out)[at] = to_bf16(sum);
        }
    }
}

bool on_device(Pointer at, uint64_t bytes) {
    const auto address = reinterpret_cast<unsigned long long>(at);
    unsigned long long start = 0;
    size_t all = 0;
    return cuMemGetAddressRange_v2(&start, &all, address) == 0 && address + bytes <= start + all;
}

bool on_device(Pointer at, const Layout& layout) {
    const uint64_t element = layout.type == E4M3 ? 1 : layout.type == BF16 ? 2 : 4;
    const uint64_t last = (layout.cols - 1) * static_cast<uint64_t>(layout.stride) + layout.rows;
    // Without a word in the preference, algorithms count on so much.
    return on_device(at, last * element) && reinterpret_cast<uintptr_t>(at) % 256 == 0;
}

template <typename T>
int set(T& to, const void* from, size_t bytes) {
    if (bytes != sizeof to) return INVALID_VALUE;
    return std::memcpy(&to, from, bytes), SUCCESS;
}

int open_handle;

}  // namespace

EXPORTED size_t cublasLtGetVersion() { return 130000; }
EXPORTED const char* cublasLtGetStatusString(int status) {
    switch (status) {
        case INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
        case EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
        default: return "CUBLAS_STATUS";
    }
}
EXPORTED int cublasLtCreate(void** handle) { return *handle = &open_handle, SUCCESS; }
EXPORTED int cublasLtDestroy(void* handle) {
    return handle == &open_handle ? SUCCESS : INVALID_VALUE;
}
EXPORTED int cublasLtMatmulDescCreate(Desc** desc, int compute, int scale_type) {
    *desc = new Desc;
    (*desc)->compute = compute, (*desc)->scale_type = scale_type;
    return SUCCESS;
}
EXPORTED int cublasLtMatmulDescDestroy(Desc* desc) { return delete desc, SUCCESS; }
EXPORTED int cublasLtMatmulDescSetAttribute(Desc* desc, int what, const void* from, size_t bytes) {
    switch (what) {
        case 3: return set(desc->transposed_a, from, bytes);
        case 4: return set(desc->transposed_b, from, bytes);
        case 7: return set(desc->epilogue, from, bytes);
        case 8: return set(desc->bias, from, bytes);
        case 17: return set(desc->scales_a, from, bytes);
        case 18: return set(desc->scales_b, from, bytes);
        case 25: return set(desc->fast_sums, from, bytes);
        case 26: return set(desc->bias_type, from, bytes);
        case 31: return set(desc->scale_a, from, bytes);
        case 32: return set(desc->scale_b, from, bytes);
        default: return INVALID_VALUE;
    }
}
EXPORTED int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols,
                                        int64_t stride) {
    return *layout = new Layout{type, rows, cols, stride}, SUCCESS;
}
EXPORTED int cublasLtMatrixLayoutDestroy(Layout* layout) { return delete layout, SUCCESS; }
EXPORTED int cublasLtMatrixLayoutSetAttribute(Layout* layout, int what, const void* from,
                                              size_t bytes) {
    switch (what) {
        case 2: return set(layout->rows, from, bytes);
        case 3: return set(layout->cols, from, bytes);
        case 4: return set(layout->stride, from, bytes);
        default: return INVALID_VALUE;
    }
}
EXPORTED int cublasLtMatmulPreferenceCreate(uint64_t** preference) {
    return *preference = new uint64_t(0), SUCCESS;
}
EXPORTED int cublasLtMatmulPreferenceDestroy(uint64_t* preference) {
    return delete preference, SUCCESS;
}
EXPORTED int cublasLtMatmulPreferenceSetAttribute(uint64_t*, int what, const void*, size_t bytes) {
    const size_t wanted = what == 1 ? 8 : what == 3 ? 4 : 0;
    return bytes == wanted ? SUCCESS : INVALID_VALUE;
}
EXPORTED int cublasLtMatmulAlgoGetHeuristic(void*, Desc* desc, Layout* a, Layout* b, Layout* c,
                                            Layout* d, void*, int asked, Found* found,
                                            int* count) {
    const Product product{desc, a, b, c, d};
    *count = 0;
    if (const int status = check(product)) return status;
    const char* candidates = getenv("FAKE_CANDIDATES");
    const int all = candidates ? std::atoi(candidates) : 1;
    for (; *count < asked && *count < all; ++*count) {
        const auto candidate = static_cast<uint64_t>(*count);
        found[*count] = {{MARK, candidate, product.m(), product.n(), product.k(), product.kind(),
                          {}}, 0, SUCCESS, 1.0f, {}};
    }
    return SUCCESS;
}
EXPORTED int cublasLtMatmulAlgoCheck(void*, Desc* desc, Layout* a, Layout* b, Layout* c, Layout* d,
                                     const Algorithm* algorithm, Found* result) {
    const Product product{desc, a, b, c, d};
    const int refused = check(product);
    const int status = refused ? refused : check_algorithm(product, *algorithm);
    *result = {*algorithm, 0, status, 1.0f, {}};
    return status;
}
EXPORTED int cublasLtMatmul(void*, Desc* desc, const float* alpha, Pointer x, Layout* a, Pointer y,
                            Layout* b, const float* beta, Pointer c_at, Layout* c, void* out,
                            Layout* d, const Algorithm* algorithm, Pointer workspace,
                            size_t workspace_bytes, void* stream) {
    const Product product{desc, a, b, c, d};
    if (const int status = check(product)) return status;
    if (const int status = check_algorithm(product, *algorithm)) return status;
    if (*beta != 0 || c_at != out || !on_device(workspace, workspace_bytes)) return INVALID_VALUE;
    if (!on_device(x, *a) || !on_device(y, *b) || !on_device(out, *d)) return EXECUTION_FAILED;
    // Never freed: a graph may run it again.
    auto* job = new Job{*desc, *a, *b, *d, *alpha, x, y, out};
    return cuLaunchHostFunc(stream, run, job) == 0 ? SUCCESS : EXECUTION_FAILED;
}
