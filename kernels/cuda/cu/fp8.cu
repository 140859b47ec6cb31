// Activations as e4m3 with f32 scales, and back: what products in fp8 take, and what devices that
// have none fall back on.
//
//   quantize, a scale for each row:  scale[t] = max |x[t]| / 448, code = x / scale
//   quantize, one scale given:       code = x / scale, at most ±448
//   dequantize:                      out = code · scale
//
// x / scale is taken as x · (1 / scale). NaN stays NaN; an infinity makes its row's scale infinite
// and itself NaN, so that what comes of the row is NaN and noticed. A row whose largest value is
// below 448 · 2^-100 counts as if it were that, which is finite and codes zeros as zeros.
//
// Moves 3 bytes an element. Bound by memory. With scales for rows, a row is read once and stays in
// registers between its maximum and the rounding: a warp has one of up to 1024 elements, 256
// threads one of up to 8192, 512 threads one of up to 32768.
#include "common.cuh"

constexpr int THREADS = 256;
// Elements of a vector.
constexpr int VECTOR = 8;
constexpr float LARGEST = 448.0f;
// 2^-100
constexpr float LEAST_SCALE = 7.888609052210118e-31f;

struct QuantizeArgs {
    uint8_t* codes;  // [rows, cols]
    float* scales;   // [rows]
    const bf16* x;   // [rows, cols]
    uint64_t rows;
    uint64_t cols;  // a multiple of 8
};

// 8 elements · factor.
DEVICE Bytes8 codes_of(const Bytes16& packed, float factor) {
    Bytes8 codes;
    for (int i = 0; i < 2; ++i) {
        const uint32_t a = packed.words[2 * i], b = packed.words[2 * i + 1];
        const float four[4] = {low_bf16(a) * factor, high_bf16(a) * factor, low_bf16(b) * factor,
                               high_bf16(b) * factor};
        codes.words[i] = pack_fp8x4(four);
    }
    return codes;
}

// The largest over a block; every thread gets it. `scratch`: threads / 32 floats, not in use.
template <int threads>
DEVICE float block_max(float x, float* scratch) {
    x = warp_max(x);
    if constexpr (threads > WARP) {
        if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
        __syncthreads();
        for (int w = 0; w < threads / WARP; ++w) x = fmaxf(x, scratch[w]);
    }
    return x;
}

// One row by `threads` threads of `depth` vectors, of which this is number `thread`.
template <int threads, int depth>
DEVICE void quantize_row(const QuantizeArgs& args, uint64_t row, uint32_t thread, float* scratch) {
    const uint64_t start = row * args.cols;
    Bytes16 x[depth] = {};
    for (int i = 0; i < depth; ++i) {
        const uint32_t at = (i * threads + thread) * VECTOR;
        if (at >= args.cols) break;
        x[i] = load16_stream(args.x + start + at);
    }
    uint32_t pair = 0;
    for (int i = 0; i < depth; ++i)
        for (int w = 0; w < 4; ++w) pair = max_bf16x2(pair, x[i].words[w] & 0x7fff7fffu);
    const float largest = block_max<threads>(fmaxf(low_bf16(pair), high_bf16(pair)), scratch);
    const float scale = fmaxf(largest / LARGEST, LEAST_SCALE);
    const float factor = 1.0f / scale;
    if (thread == 0) args.scales[row] = scale;
    for (int i = 0; i < depth; ++i) {
        const uint32_t at = (i * threads + thread) * VECTOR;
        if (at >= args.cols) break;
        store8(args.codes + start + at, codes_of(x[i], factor));
    }
}

// Four rows a block.
KERNEL(quantize_rows_1024, QuantizeArgs, 128) {
    follow_launches();
    const uint64_t row = static_cast<uint64_t>(blockIdx.x) * 4 + threadIdx.x / WARP;
    if (row < args.rows) quantize_row<WARP, 4>(args, row, threadIdx.x % WARP, nullptr);
}
KERNEL(quantize_rows_8192, QuantizeArgs, 256) {
    follow_launches();
    quantize_row<256, 4>(args, blockIdx.x, threadIdx.x, shared_memory<float>());
}
KERNEL(quantize_rows_32768, QuantizeArgs, 512) {
    follow_launches();
    quantize_row<512, 8>(args, blockIdx.x, threadIdx.x, shared_memory<float>());
}

// Every vector of the tensor alike, two a thread, a block apart.
struct ScaleArgs {
    uint8_t* codes;       // [rows, cols]
    bf16* x;              // [rows, cols]
    const float* scales;  // [1], or [rows]
    uint32_t vectors;
    uint32_t row_vectors;  // those under one scale
};

constexpr int DEPTH = 2;

DEVICE uint32_t first_vector() { return blockIdx.x * (THREADS * DEPTH) + threadIdx.x; }

KERNEL(quantize_tensor, ScaleArgs, THREADS) {
    follow_launches();
    const uint32_t first = first_vector();
    Bytes16 x[DEPTH] = {};
    for (int i = 0; i < DEPTH; ++i) {
        const uint64_t at = first + i * THREADS;
        if (at < args.vectors) x[i] = load16_stream(args.x + at * VECTOR);
    }
    const float factor = 1.0f / *args.scales;
    for (int i = 0; i < DEPTH; ++i) {
        const uint64_t at = first + i * THREADS;
        if (at < args.vectors) store8(args.codes + at * VECTOR, codes_of(x[i], factor));
    }
}

KERNEL(dequantize_bf16, ScaleArgs, THREADS) {
    follow_launches();
    const uint32_t first = first_vector();
    Bytes8 codes[DEPTH] = {};
    float scales[DEPTH] = {};
    for (int i = 0; i < DEPTH; ++i) {
        const uint32_t at = first + i * THREADS;
        if (at >= args.vectors) break;
        codes[i] = load8(args.codes + static_cast<uint64_t>(at) * VECTOR);
        scales[i] = args.scales[at / args.row_vectors];
    }
    for (int i = 0; i < DEPTH; ++i) {
        const uint32_t at = first + i * THREADS;
        if (at >= args.vectors) break;
        Bytes16 out;
        for (int j = 0; j < 2; ++j) {
            float x[4];
            unpack_fp8x4(codes[i].words[j], x);
            out.words[2 * j] = pack_bf16(x[0] * scales[i], x[1] * scales[i]);
            out.words[2 * j + 1] = pack_bf16(x[2] * scales[i], x[3] * scales[i]);
        }
        store16(args.x + static_cast<uint64_t>(at) * VECTOR, out);
    }
}
