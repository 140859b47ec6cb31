// Root-mean-square norm of rows, alone and after a residual sum.
//
//   rms_norm:      out [T, H] = x / sqrt(mean(x²) + eps) · weight [H]
//   add_rms_norm:  x [T, H] += delta [T, H], rounded to bf16 and stored, then rms_norm of that x,
//                  bit for bit as the two ops one after the other
//
// f32 sums in an order that depends on H alone; one rounding at the end. One pass: a row is read
// once and stays in registers, packed, between the sum and the scaling, so rms_norm moves 4 bytes
// an element and add_rms_norm 8. Bound by memory. The weight is read by every row; it is the only
// load that fills the L1, where it stays.
//
// A warp has a row of up to 1024 elements, a block of 256 threads one of up to 8192, of 512 threads
// one of up to 16384: 4 vectors of 16 bytes a thread at most, so an SM keeps 64 bytes of each of
// 1024 threads or more on the way.
#include "norm.cuh"

struct NormArgs {
    bf16* out;           // [rows, cols]
    bf16* x;             // [rows, cols]; only written where there is a sum
    const bf16* delta;   // [rows, cols], of add_rms_norm
    const bf16* weight;  // [cols]
    uint64_t rows;
    uint32_t cols;  // a multiple of 8
    float eps;
};

// One row by `threads` threads, of which this is number `thread`. `scratch`: threads / 32 floats of
// shared memory; not used by a warp.
template <int threads, bool add>
DEVICE void norm_row(const NormArgs& args, uint64_t row, uint32_t thread, float* scratch) {
    const uint64_t start = row * args.cols;
    Bytes16 x[DEPTH] = {}, delta[DEPTH] = {};
    for (int i = 0; i < DEPTH; ++i) {
        const uint32_t at = (i * threads + thread) * VECTOR;
        if (at >= args.cols) break;
        x[i] = add ? load16(args.x + start + at) : load16_stream(args.x + start + at);
        if (add) delta[i] = load16_stream(args.delta + start + at);
    }
    RowSum sum;
    for (int i = 0; i < DEPTH; ++i) {
        const uint32_t at = (i * threads + thread) * VECTOR;
        if (at >= args.cols) break;
        if (add) {
            add_vector(x[i], delta[i]);
            store16(args.x + start + at, x[i]);
        }
        sum.take(x[i]);
    }
    write_normed<threads>(x, sum, {args.out + start, args.weight, args.cols, args.eps}, thread,
                          scratch);
}

// Four rows a block.
template <bool add>
DEVICE void norm_by_warp(const NormArgs& args) {
    follow_launches();
    const uint64_t row = static_cast<uint64_t>(blockIdx.x) * 4 + threadIdx.x / WARP;
    if (row < args.rows) norm_row<WARP, add>(args, row, threadIdx.x % WARP, nullptr);
}

template <int threads, bool add>
DEVICE void norm_by_block(const NormArgs& args) {
    follow_launches();
    norm_row<threads, add>(args, blockIdx.x, threadIdx.x, shared_memory<float>());
}

KERNEL(rms_norm_1024, NormArgs, 128) { norm_by_warp<false>(args); }
KERNEL(rms_norm_8192, NormArgs, 256) { norm_by_block<256, false>(args); }
KERNEL(rms_norm_16384, NormArgs, 512) { norm_by_block<512, false>(args); }
KERNEL(add_rms_norm_1024, NormArgs, 128) { norm_by_warp<true>(args); }
KERNEL(add_rms_norm_8192, NormArgs, 256) { norm_by_block<256, true>(args); }
KERNEL(add_rms_norm_16384, NormArgs, 512) { norm_by_block<512, true>(args); }
