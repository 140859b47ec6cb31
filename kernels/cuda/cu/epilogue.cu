// What a product's library does at its end where it can, for products that it refuses whole:
// scales for the rows of both operands, and a bias, on sums in f32. A way around, not a fast path:
// bound by memory, one element a thread.
//
//   out [rows, cols] = sums [rows, cols] · x_scales [rows] · weight_scales [cols] + bias [cols]
#include "common.cuh"

constexpr int THREADS = 256;

struct EpilogueArgs {
    void* out;                   // bf16, or f32
    const float* sums;
    const float* x_scales;       // both scales, or neither
    const float* weight_scales;
    const bf16* bias;            // may be null
    uint64_t elements;
    uint64_t cols;
    uint64_t stride;             // between rows of out
    uint64_t f32_out;
};

KERNEL(product_epilogue, EpilogueArgs, THREADS) {
    const uint64_t at = static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= args.elements) return;
    const uint64_t row = at / args.cols, col = at % args.cols;
    float sum = args.sums[at];
    if (args.x_scales != nullptr) sum = sum * args.x_scales[row] * args.weight_scales[col];
    if (args.bias != nullptr) sum += to_float(args.bias[col]);
    const uint64_t to = row * args.stride + col;
    if (args.f32_out) {
        static_cast<float*>(args.out)[to] = sum;
    } else {
        static_cast<bf16*>(args.out)[to] = to_bf16(sum);
    }
}
