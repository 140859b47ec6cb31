// Decode attention of one warp: tiles of 16 tokens in shared memory, and the products, softmax and
// sums of up to 16 query heads over them.
//
// Tiles are swizzled by the row's number, so that 8 rows of one 16-byte column lie in 8 different
// bank groups: neither ldmatrix nor the copies have conflicts.
//
// e4m3: products are of f16, which holds e4m3 exactly and is two conversions away; queries come
// into its range by a power of two a head, weights are in it. A lane's 4 bytes of ldmatrix become
// two registers, bytes 0 and 2, bytes 1 and 3. For K those are 4 consecutive dimensions, which Q's
// fragments take in the same order; for V (a transposed load of pairs of bytes) they are two tokens
// of an even and of an odd dimension. So nothing is exchanged between lanes. The scales are in
// `score_scale` and `value_scale`.
#pragma once

#include "common.cuh"

namespace decoding {

// Keys of one thread block; the launcher cuts by the same number.
constexpr int SPLIT_TOKENS = 512;
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
// Query heads of one thread block: the rows of a product.
constexpr int TILE_HEADS = 16;
static_assert(SPLIT_TOKENS / BLOCK_TOKENS <= WARP, "a lane for each KV block of a split");

struct e4m3 {
    uint8_t bits;
};

// A score's maximum so far and the sum of 2^(score - max).
struct alignas(8) Weight {
    float max, sum;
};

// The 16 tokens of a KV block for one head, in shared memory.
template <typename T, int D>
struct Tile {
    static constexpr int ROW = D * static_cast<int>(sizeof(T));
    static constexpr int CHUNKS = ROW / 16;
    static constexpr int ELEMENTS = BLOCK_TOKENS * ROW;
    static constexpr bool SCALED = sizeof(T) == 1;
    // In the cache.
    static constexpr int STORED = SCALED ? Fp8Block<D>::BYTES : ELEMENTS;
    // In shared memory: keys with their scales and those of their values.
    static constexpr int BYTES = ELEMENTS + (SCALED ? 2 * Fp8Block<D>::SCALES : 0);
    // K and V tiles of each warp.
    static constexpr int STAGES = ELEMENTS == 4096 ? 2 : 4;

    // Where 16 bytes of a row lie: 8 rows of one chunk are in 8 different groups of 4 banks.
    static DEVICE int offset(int row, int chunk) {
        return row * ROW + (chunk ^ turn(row)) * 16;
    }
    static DEVICE int turn(int row) { return CHUNKS >= 8 ? row % 8 : row / 2 % 4; }

    // Copies rows from..to of a warp's tile, and makes the others zero: 0 · NaN must not be.
    static DEVICE void fetch(unsigned char* tile, const unsigned char* block, int from, int to) {
        constexpr int COPIES = ELEMENTS / 16 / WARP, ROWS = WARP / CHUNKS;
        const int lane = static_cast<int>(threadIdx.x) % WARP, first = lane / CHUNKS;
        const int start = offset(first, lane % CHUNKS);
        const bool whole = from <= 0 && to >= BLOCK_TOKENS;
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            // As offset(first + i * ROWS, ..): the two parts of the row have no bit in common.
            unsigned char* at = tile + (start ^ turn(i * ROWS) * 16) + i * ROWS * ROW;
            const unsigned char* source = block + (i * WARP + lane) * 16;
            const int row = first + i * ROWS;
            if (whole) {
                cp_async_16(at, source);
            } else {
                cp_async_16(at, source, row >= from && row < to);
            }
        }
    }
};

// Copies the scales behind the codes of a block's keys and of its values: those too, since weights
// need them before the values come.
template <typename T, int D>
DEVICE void fetch_scales(unsigned char* tile, const unsigned char* keys,
                         const unsigned char* values) {
    using Stored = Fp8Block<D>;
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    if (!Tile<T, D>::SCALED || lane >= Stored::SCALES / 16) return;
    unsigned char* to = tile + Tile<T, D>::ELEMENTS + lane * 16;
    cp_async_16(to, keys + Stored::CODES + lane * 16);
    cp_async_16(to + Stored::SCALES, values + Stored::CODES + lane * 16);
}

// Four e4m3 as f16: bytes 0 and 2, then bytes 1 and 3.
DEVICE void widen(uint32_t packed, uint32_t (&pairs)[2]) {
    fp8x4_to_f16(swap_middle_bytes(packed), pairs);
}

// A warp's share of a split, in the layout of mma_16816: lane l has rows (heads) g = l / 4 and
// g + 8, and of a tile's 8 columns 2t and 2t + 1, t = l % 4.
template <typename T, int D>
struct Lane {
    using Shape = Tile<T, D>;
    static constexpr bool WIDE = sizeof(T) == 2;

    uint32_t q[D / 16][4];
    // Columns are dimensions: 8n.. of tile n in order; of e4m3, 16 of tiles 2n and 2n + 1 in turn.
    float sums[D / 8][4];
    float max[2], total[2];
    // What makes products logarithms of weights.
    float scale[2];

    // The products' left side: heads `first` and the next, `stride` elements apart, zero from
    // `heads` on.
    DEVICE void load_q(const bf16* first, int stride, int heads, float score_scale) {
        const int lane = static_cast<int>(threadIdx.x) % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int head = g + 8 * half;
            const bf16* row = first + head * stride;
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                uint32_t low = 0, high = 0;
                if (head < heads && WIDE) {
                    low = load_pair(row + 16 * k + 2 * t);
                    high = load_pair(row + 16 * k + 8 + 2 * t);
                }
                if (head < heads && !WIDE) {
                    const uint32_t a = load_pair(row + 16 * k + 4 * t);
                    const uint32_t b = load_pair(row + 16 * k + 4 * t + 2);
                    low = (a & 0xffffu) | b << 16;
                    high = a >> 16 | (b & 0xffff0000u);
                }
                q[k][half] = low;
                q[k][2 + half] = high;
            }
            scale[half] = score_scale;
            if constexpr (!WIDE) scale[half] *= narrow_q(half);
        }
    }

    // Makes q f16, each head divided by the greatest power of two that is no greater than its
    // greatest element, so that nothing overflows; returns that power.
    DEVICE float narrow_q(int half) {
        float most = 0.0f;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            for (int i = half; i < 4; i += 2) {
                most = fmaxf(most, fabsf(low_bf16(q[k][i])));
                most = fmaxf(most, fabsf(high_bf16(q[k][i])));
            }
        }
        most = warp_max<4>(most);
        const uint32_t exponent = min(__float_as_uint(most) >> 23, 253u);
        const float divisor = __uint_as_float((254 - exponent) << 23);
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            for (int i = half; i < 4; i += 2)
                q[k][i] = pack_f16(low_bf16(q[k][i]) * divisor, high_bf16(q[k][i]) * divisor);
        }
        return __uint_as_float(exponent << 23);
    }

    static DEVICE uint32_t pack(float low, float high) {
        return WIDE ? pack_bf16(low, high) : pack_f16(low, high);
    }

    static DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        if constexpr (WIDE) {
            mma_16816(d, a, b0, b1);
        } else {
            mma_16816_f16(d, a, b0, b1);
        }
    }

    DEVICE void clear() {
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
        for (int half = 0; half < 2; ++half) {
            max[half] = -INFINITY;
            total[half] = 0.0f;
        }
    }

    // scores [16 heads, 16 tokens] = q · keysᵀ, as two tiles of 8 tokens.
    DEVICE void multiply_keys(float (&scores)[2][4], const unsigned char* keys) const {
        const int lane = static_cast<int>(threadIdx.x) % WARP;
        const int row = lane / 16 * 8 + lane % 8, side = lane / 8 % 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[0][i] = scores[1][i] = 0.0f;
#pragma unroll
        for (int pair = 0; pair < Shape::CHUNKS / 2; ++pair) {
            uint32_t k[4];
            ldmatrix_x4(k, keys + Shape::offset(row, 2 * pair + side));
            if constexpr (WIDE) {
                multiply(scores[0], q[pair], k[0], k[1]);
                multiply(scores[1], q[pair], k[2], k[3]);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    uint32_t pairs[2];
                    widen(k[i], pairs);
                    multiply(scores[i / 2], q[2 * pair + i % 2], pairs[0], pairs[1]);
                }
            }
        }
    }

    // Takes 16 tokens' scores, of which those at from..to count, into maximum and total, and makes
    // them weights, the right side's partner in multiply_values. `scales`: of the tokens' keys and
    // values, where they have some.
    DEVICE void soften(float (&scores)[2][4], int from, int to, uint32_t (&p)[4],
                       const float* scales) {
        const int t = static_cast<int>(threadIdx.x) % 4;
        const auto token_of = [&](int i) { return i / 2 * 8 + 2 * t + i % 2; };
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = token_of(i);
            float key = 1.0f, shift = 0.0f;
            if constexpr (!WIDE) {
                key = scales[token];
                shift = log2_approx(scales[BLOCK_TOKENS + token]);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& score = scores[i / 2][2 * half + i % 2];
                const float scaled = score * scale[half] * key + shift;
                score = token >= from && token < to ? scaled : -INFINITY;
            }
        }
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float* low = &scores[0][2 * half];
            float* high = &scores[1][2 * half];
            const float most = fmaxf(fmaxf(low[0], low[1]), fmaxf(high[0], high[1]));
            const float next = fmaxf(max[half], warp_max<4>(most));
            shrink[half] = exp2_approx(max[half] - next);
            max[half] = next;
            for (int j = 0; j < 2; ++j) {
                low[j] = exp2_approx(low[j] - next);
                high[j] = exp2_approx(high[j] - next);
            }
            float sum = 0.0f;
            if constexpr (WIDE) {
                sum = (low[0] + low[1]) + (high[0] + high[1]);
            } else {
                // Read again: registers are short. What was never written may be anything.
                const volatile float* again = scales + BLOCK_TOKENS;
                for (int j = 0; j < 2; ++j) {
                    sum += low[j] > 0.0f ? low[j] / again[token_of(j)] : 0.0f;
                    sum += high[j] > 0.0f ? high[j] / again[token_of(2 + j)] : 0.0f;
                }
            }
            total[half] = total[half] * shrink[half] + sum;
            p[half] = pack(low[0], low[1]);
            p[2 + half] = pack(high[0], high[1]);
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            for (int i = 0; i < 4; ++i) sums[n][i] *= shrink[i / 2];
    }

    // sums += p [16 heads, 16 tokens] · values.
    DEVICE void multiply_values(const uint32_t (&p)[4], const unsigned char* values) {
        const int lane = static_cast<int>(threadIdx.x) % WARP;
#pragma unroll
        for (int pair = 0; pair < Shape::CHUNKS / 2; ++pair) {
            uint32_t v[4];
            ldmatrix_x4_trans(v, values + Shape::offset(lane % 16, 2 * pair + lane / 16));
            if constexpr (WIDE) {
                multiply(sums[2 * pair], p, v[0], v[1]);
                multiply(sums[2 * pair + 1], p, v[2], v[3]);
            } else {
#pragma unroll
                for (int chunk = 0; chunk < 2; ++chunk) {
                    uint32_t low[2], high[2];
                    widen(v[2 * chunk], low);
                    widen(v[2 * chunk + 1], high);
                    multiply(sums[4 * pair + 2 * chunk], p, low[0], high[0]);
                    multiply(sums[4 * pair + 2 * chunk + 1], p, low[1], high[1]);
                }
            }
        }
    }

    // The dimension of sums[n][i].
    static DEVICE int dimension(int n, int i) {
        const int t = static_cast<int>(threadIdx.x) % 4;
        return WIDE ? 8 * n + 2 * t + i % 2 : n / 2 * 16 + 4 * t + i % 2 * 2 + n % 2;
    }
};

}  // namespace decoding
