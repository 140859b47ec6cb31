// What a block makes of a product of few tokens (`skinny_linear.cuh`); what becomes of its sums.
#pragma once

#include "silu.cuh"
#include "skinny.cuh"

namespace skinny {

constexpr int STRIPS = 4;
constexpr int WARPS = 2 * STRIPS;
// And the one that feeds.
constexpr int THREADS = (WARPS + 1) * WARP;
constexpr int STAGES_MAX = 8;
// Of the barriers, before the ring.
constexpr int HEAD_BYTES = 128;

struct SkinnyArgs {
    const unsigned char* weight;  // [strips][records]
    const bf16* x;                // [tokens, cols]
    const float* scales;          // [rows] or null
    const bf16* bias;             // [rows] or null
    void* out;                    // [tokens, rows] in f32 or bf16; of pairs [tokens, pairs] in bf16
    Bytes16* sums;                // [tiles][8 warps][parts][vectors][32 lanes]
    uint32_t* arrived;            // [tiles][8 warps], zero before and after
    uint32_t tokens;
    uint32_t rows;     // a multiple of 8
    uint32_t cols;     // a multiple of 8
    uint32_t lead;     // columns of the first record that precede x's, a multiple of 8
    uint32_t records;  // of a strip
    uint32_t parts;
    uint32_t stages;
    uint32_t out_f32;
    uint32_t in_bulk;  // see moves_in_bulk
    uint32_t pairs;    // a multiple of 8; 0 where rows are not gates and ups in turn
};

// What a block makes at a time: a tile's records `first` to `end`, for some tokens. Their results
// begin at row `place`; of several weights, one behind another, it is number `weight`.
struct Unit {
    uint32_t tile, part, first, end, strips, tokens, place, weight;
};

// A warp's: two matrices of 16 rows by eights of tokens.
template <int tokens>
using Sums = float[2][tokens / 8][4];

// Four consecutive rows' sums of a token are a vector; a lane has those of tokens 2 t and 2 t + 1
// of every eight.
template <int tokens>
constexpr int VECTORS = tokens / 4;

template <int tokens>
DEVICE void vector_of(float (&x)[LANE_ROWS], const Sums<tokens>& sums, int vector) {
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) x[i] = sums[i / 2][vector / 2][i % 2 * 2 + vector % 2];
}

// Writes four rows of a token: what may follow a product is done here.
struct Epilogue {
    const SkinnyArgs& args;
    const Unit& unit;

    DEVICE void operator()(uint32_t token, uint32_t row, float (&x)[LANE_ROWS]) const {
        if (token >= unit.tokens || row >= args.rows) return;
        if (args.pairs != 0) return gated(token, row / 2, x);
        if (args.scales != nullptr) {
            const Bytes16 scales = load16(scales_at(row));
#pragma unroll
            for (int i = 0; i < LANE_ROWS; ++i) x[i] *= __uint_as_float(scales.words[i]);
        }
        if (args.bias != nullptr) {
            const Bytes8 bias = load8(args.bias + row);
#pragma unroll
            for (int i = 0; i < LANE_ROWS / 2; ++i) {
                x[2 * i] += low_bf16(bias.words[i]);
                x[2 * i + 1] += high_bf16(bias.words[i]);
            }
        }
        const uint64_t at = static_cast<uint64_t>(unit.place + token) * args.rows + row;
        if (args.out_f32 != 0) {
            Bytes16 v;
#pragma unroll
            for (int i = 0; i < LANE_ROWS; ++i) v.words[i] = __float_as_uint(x[i]);
            store16(static_cast<float*>(args.out) + at, v);
        } else {
            const Bytes8 v = {{pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3])}};
            store8(static_cast<bf16*>(args.out) + at, v);
        }
    }

    // Outputs i and i + 1, each of a gate and an up that are rounded as a product's results are.
    DEVICE void gated(uint32_t token, uint32_t i, float (&x)[LANE_ROWS]) const {
        if (args.scales != nullptr) {
            // In the matrix's order.
            const Bytes8 gate = load8(scales_at(i)), up = load8(scales_at(args.pairs + i));
#pragma unroll
            for (int n = 0; n < LANE_ROWS / 2; ++n) {
                x[2 * n] *= __uint_as_float(gate.words[n]);
                x[2 * n + 1] *= __uint_as_float(up.words[n]);
            }
        }
        const uint64_t at = static_cast<uint64_t>(unit.place + token) * args.pairs + i;
        store_word(static_cast<bf16*>(args.out) + at,
                   silu_mul(pack_bf16(x[0], x[2]), pack_bf16(x[1], x[3])));
    }

    DEVICE const float* scales_at(uint32_t row) const {
        return args.scales + static_cast<uint64_t>(unit.weight) * args.rows + row;
    }
};

// Leaves a warp's sums of a part; true in the warp that came last, which then sees all.
template <int tokens>
DEVICE bool leave_sums(Bytes16* to, uint32_t* arrived, uint32_t parts, const Sums<tokens>& sums) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int vector = 0; vector < VECTORS<tokens>; ++vector) {
        float x[LANE_ROWS];
        vector_of<tokens>(x, sums, vector);
        Bytes16 v;
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) v.words[i] = __float_as_uint(x[i]);
        store16(to + vector * WARP + lane, v);
    }
    __threadfence();
    __syncwarp();
    bool last = false;
    if (lane == 0) {
        last = atomicAdd(arrived, 1u) == parts - 1;
        if (last) *arrived = 0;
    }
    last = __shfl_sync(ALL_LANES, last, 0);
    if (last) __threadfence();
    return last;
}

// Adds all parts' sums, in their order.
template <int tokens>
DEVICE void add_parts(Sums<tokens>& sums, const Bytes16* from, uint32_t parts) {
    [[maybe_unused]] constexpr int UNROLL = tokens >= 64 ? 1 : 64 / tokens;
#pragma unroll
    for (int i = 0; i < tokens; ++i) sums[i % 2][i / 8][i / 2 % 4] = 0.0f;
#pragma unroll UNROLL
    for (uint32_t part = 0; part < parts; ++part) {
        Bytes16 more[VECTORS<tokens>];
#pragma unroll
        for (int vector = 0; vector < VECTORS<tokens>; ++vector)
            more[vector] = load16_shared_by_blocks(from + vector * WARP);
#pragma unroll
        for (int i = 0; i < LANE_ROWS * VECTORS<tokens>; ++i) {
            const int vector = i / LANE_ROWS, row = i % LANE_ROWS;
            sums[row / 2][vector / 2][row % 2 * 2 + vector % 2] +=
                __uint_as_float(more[vector].words[row]);
        }
        from += VECTORS<tokens> * WARP;
    }
}

template <int tokens>
DEVICE void finish(const SkinnyArgs& args, const Unit& unit, Sums<tokens>& sums) {
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (args.parts > 1) {
        const uint32_t place = unit.tile * WARPS + warp;
        constexpr uint64_t PART = VECTORS<tokens> * WARP;
        Bytes16* all = args.sums + static_cast<uint64_t>(place) * args.parts * PART;
        uint32_t* arrived = args.arrived + place;
        if (!leave_sums<tokens>(all + unit.part * PART, arrived, args.parts, sums)) return;
        add_parts<tokens>(sums, all + lane, args.parts);
    }
    const Epilogue write{args, unit};
    const uint32_t row = (unit.tile * STRIPS + warp / 2) * STRIP + warp % 2 * HALF +
                         lane / 4 * LANE_ROWS;
#pragma unroll
    for (int vector = 0; vector < VECTORS<tokens>; ++vector) {
        float x[LANE_ROWS];
        vector_of<tokens>(x, sums, vector);
        write(vector / 2 * 8 + lane % 4 * 2 + vector % 2, row, x);
    }
}

}  // namespace skinny
