// 4-bit weights as bf16, for products of many tokens. Layout: `int4.cuh`.
//
// out [N, K] = W, rounded to bf16 once, for a product of bf16. Reads 0.53 bytes and writes 2 an
// element: bound by memory. One warp a record; 16 consecutive bytes a lane and store, 64 a row.
#include "int4.cuh"

using namespace int4_weights;

constexpr int THREADS = 256;

struct Int4DequantizeArgs {
    const unsigned char* weight;  // [strips][stages] records
    bf16* out;                    // [rows, cols]
    uint32_t rows;
    uint32_t cols;    // a multiple of 8
    uint32_t lead;    // as Int4LinearArgs'
    uint32_t stages;
    uint32_t strips;
    uint32_t unused;
};

template <int group>
DEVICE void int4_dequantize(const Int4DequantizeArgs& args) {
    const int lane = threadIdx.x % WARP;
    const uint64_t warp = (static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x) / WARP;
    if (warp >= static_cast<uint64_t>(args.strips) * args.stages) return;
    const unsigned char* record = args.weight + warp * RECORD<group>;
    const uint32_t strip = warp / args.stages, stage = warp % args.stages;
    const uint32_t first_row = strip * STRIP + lane / 4;
    // Columns before the first wrap around to large ones.
    const uint32_t first_col = stage * STAGE_COLS + lane % 4 * 8 - args.lead;
    for (int slot = 0; slot < STAGE_COLS / SLOT_COLS; ++slot) {
        const unsigned char* factors =
            record + STRIP_BYTES + slot * SLOT_COLS / group * FACTOR_BYTES + lane / 4 * 16;
        const uint32_t col = first_col + slot * SLOT_COLS;
#pragma unroll
        for (int rows = 0; rows < 2; ++rows) {
            const Bytes16 factor = load16(factors + rows * (FACTOR_BYTES / 2));
            const Bytes16 q = load16_stream(record + slot * SLOT_BYTES + rows * (SLOT_BYTES / 2) +
                                            lane * 16);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                uint32_t a[2][4];
#pragma unroll
                for (int step = 0; step < 2; ++step)
                    dequantize(a[step], q.words[2 * m + step],
                               biased_zero(factor.words[2 * m]),
                               biased_zero(factor.words[2 * m + 1]));
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float scale = half_to_float(factor.words[2 * m + r]);
                    const uint32_t row = first_row + rows * 32 + m * 16 + r * 8;
                    Bytes16 v;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const uint32_t pair = a[i / 2][i % 2 * 2 + r];
                        v.words[i] = pack_bf16(low_bf16(pair) * scale, high_bf16(pair) * scale);
                    }
                    if (row < args.rows && col < args.cols)
                        store16(args.out + static_cast<uint64_t>(row) * args.cols + col, v);
                }
            }
        }
    }
}

KERNEL(int4_dequantize_g32, Int4DequantizeArgs, THREADS) { int4_dequantize<32>(args); }
KERNEL(int4_dequantize_g64, Int4DequantizeArgs, THREADS) { int4_dequantize<64>(args); }
KERNEL(int4_dequantize_g128, Int4DequantizeArgs, THREADS) { int4_dequantize<128>(args); }
