// Rows that stay in registers, packed, between their sum of squares and the scaling by it.
// Everybody who normalises a row does it by these steps, in this order: then the bits are the same.
#pragma once

#include "common.cuh"

// Elements of a vector, and vectors of a thread: thread t of `threads` has vectors t, t + threads …
constexpr int VECTOR = 8;
constexpr int DEPTH = 4;

// x += delta, rounded to bf16.
DEVICE void add_vector(Bytes16& x, const Bytes16& delta) {
    for (int w = 0; w < 4; ++w) {
        const uint32_t a = x.words[w], b = delta.words[w];
        x.words[w] = pack_bf16(low_bf16(a) + low_bf16(b), high_bf16(a) + high_bf16(b));
    }
}

// A thread's part of a row's sum of squares.
struct RowSum {
    float parts[4] = {};

    DEVICE void take(const Bytes16& x) {
        for (int w = 0; w < 4; ++w) {
            parts[w] = fmaf(low_bf16(x.words[w]), low_bf16(x.words[w]), parts[w]);
            parts[w] = fmaf(high_bf16(x.words[w]), high_bf16(x.words[w]), parts[w]);
        }
    }
};

struct NormedRow {
    bf16* out;           // [cols]
    const bf16* weight;  // [cols]
    uint32_t cols;
    float eps;
};

// out = x / sqrt(mean(x²) + eps) · weight. `scratch` as block_sum's.
template <int threads>
DEVICE void write_normed(Bytes16 (&x)[DEPTH], const RowSum& mine, const NormedRow& row,
                         uint32_t thread, float* scratch) {
    const float (&parts)[4] = mine.parts;
    const float sum = block_sum<threads>((parts[0] + parts[1]) + (parts[2] + parts[3]), scratch);
    const float factor = rsqrtf(sum / static_cast<float>(row.cols) + row.eps);
    for (int i = 0; i < DEPTH; ++i) {
        const uint32_t at = (i * threads + thread) * VECTOR;
        if (at >= row.cols) break;
        const Bytes16 weight = load16(row.weight + at);
        for (int w = 0; w < 4; ++w) {
            const uint32_t pair = x[i].words[w], by = weight.words[w];
            x[i].words[w] = pack_bf16(low_bf16(pair) * factor * low_bf16(by),
                                      high_bf16(pair) * factor * high_bf16(by));
        }
        store16(row.out + at, x[i]);
    }
}
