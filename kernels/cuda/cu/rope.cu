// What happens to packed rows qkv [T, (q + 2 kv) D] between the product that makes them and
// attention, in one pass:
//
//   1. root-mean-square norm of each query and key head, where there are weights (Qwen3)
//   2. rotation of query and key heads by cos_sin [P, D] (D/2 cosines, then D/2 sines, f32), row
//      `rope_rows[t]`: pairs are element i and i + D/2 (rotate-half, as Qwen is trained). YaRN and
//      dynamic NTK are in the table
//   3. query heads · q_scale[t] (logn attention)
//   4. query heads back in place, in bf16, rounded once
//   5. keys and values to slot `slots[t]` of the cache, keys and values each [blocks, kv, 16, D] in
//      bf16; or e4m3, each token's head divided by its scale, so that its largest element is 448:
//      [blocks, kv], each 16 rows of D codes, then 16 scales in f32 (`Fp8Block` of `common.cuh`).
//      Keys are taken as the rounded bf16 has them
//
// The norm and the factors are left out where their pointers are null.
//
// Moves 4 bytes for each element (3 of k and v with e4m3). Bound by memory.
// A head has D / 16 lanes; a lane holds 8 elements of the lower half and the 8 they are paired
// with, so nothing is exchanged but the norm's sum. A warp has 2 · 512 / D heads of one token: two
// heads a lane, 64 bytes on the way from each, under one load of its cosines and sines, which the
// other warps of the token find in the L1.
#include "common.cuh"

constexpr int THREADS = 128;
// Elements of 16 bytes, and heads of a lane.
constexpr int VECTOR = 8;
constexpr int DEPTH = 2;

struct RopeArgs {
    bf16* qkv;
    const bf16* q_norm;  // [D], or null and k_norm too
    const bf16* k_norm;  // [D]
    const float* cos_sin;
    const int32_t* rope_rows;  // [tokens]
    const float* q_scale;      // [tokens], or null
    const int32_t* slots;      // [tokens], negative for those that are not stored
    void* keys;
    void* values;
    uint32_t tokens;
    uint32_t q_heads;
    uint32_t kv_heads;
    uint32_t token_warps;  // those that share a token
    uint32_t fp8;          // whether the cache is e4m3
    float eps;
};

// 8 elements.
DEVICE void unpack(const Bytes16& packed, float* x) {
    for (int w = 0; w < 4; ++w) {
        x[2 * w] = low_bf16(packed.words[w]);
        x[2 * w + 1] = high_bf16(packed.words[w]);
    }
}

DEVICE Bytes16 pack(const float* x) {
    Bytes16 packed;
    for (int w = 0; w < 4; ++w) packed.words[w] = pack_bf16(x[2 * w], x[2 * w + 1]);
    return packed;
}

DEVICE void load_floats(const float* from, float (&x)[VECTOR]) {
    for (int i = 0; i < 2; ++i) {
        const Bytes16 four = load16(from + 4 * i);
        for (int j = 0; j < 4; ++j) x[4 * i + j] = __uint_as_float(four.words[j]);
    }
}

// Scales the head that D / 16 lanes hold together. All lanes of the warp come here; those whose
// `weight` is null have no head to scale.
template <int D>
DEVICE void norm_head(float (&x)[2 * VECTOR], const bf16* weight, int at, float eps) {
    float sum = 0.0f;
    for (int i = 0; i < 2 * VECTOR; ++i) sum = fmaf(x[i], x[i], sum);
    sum = warp_sum<D / 16>(sum);
    if (weight == nullptr) return;
    const float factor = rsqrtf(sum * (1.0f / D) + eps);
    float by[2 * VECTOR];
    unpack(load16(weight + at), by);
    unpack(load16(weight + D / 2 + at), by + VECTOR);
    for (int i = 0; i < 2 * VECTOR; ++i) x[i] = x[i] * factor * by[i];
}

// 8 elements · factor as e4m3.
DEVICE Bytes8 quantize(const float (&x)[2 * VECTOR], int first, float factor) {
    float by[VECTOR];
    for (int i = 0; i < VECTOR; ++i) by[i] = x[first + i] * factor;
    const float low[4] = {by[0], by[1], by[2], by[3]}, high[4] = {by[4], by[5], by[6], by[7]};
    return {{pack_fp8x4(low), pack_fp8x4(high)}};
}

// The head that D / 16 lanes hold together, into a block of e4m3 at `row`. All lanes of the warp
// come here; those whose `block` is null store nothing. Zeros have a scale of 1.
template <int D>
DEVICE void store_codes(unsigned char* block, uint32_t row, int at, const Bytes16& low,
                        const Bytes16& high) {
    float x[2 * VECTOR];
    unpack(low, x);
    unpack(high, x + VECTOR);
    float most = 0.0f;
    for (int i = 0; i < 2 * VECTOR; ++i) most = fmaxf(most, fabsf(x[i]));
    most = warp_max<D / 16>(most);
    if (block == nullptr) return;
    const float scale = most > 0.0f ? most * (1.0f / FP8_MAX) : 1.0f;
    const float factor = most > 0.0f ? FP8_MAX / most : 1.0f;
    unsigned char* const codes = block + row * D + at;
    store8(codes, quantize(x, 0, factor));
    store8(codes + D / 2, quantize(x, VECTOR, factor));
    if (at == 0) reinterpret_cast<float*>(block + Fp8Block<D>::CODES)[row] = scale;
}

template <int D>
DEVICE void rotate_and_store(const RopeArgs& args) {
    constexpr uint32_t LANES = D / 16, TOGETHER = WARP / LANES;
    const uint32_t warp = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    const uint32_t token = warp / args.token_warps;
    if (token >= args.tokens) return;
    const uint32_t lane = threadIdx.x % WARP;
    const uint32_t first =
        lane / LANES + (warp - token * args.token_warps) * (TOGETHER * DEPTH);
    const int at = static_cast<int>(lane % LANES) * VECTOR;
    const uint32_t rotated = args.q_heads + args.kv_heads, heads = rotated + args.kv_heads;
    bf16* const row = args.qkv + static_cast<uint64_t>(token) * heads * D + at;

    Bytes16 low[DEPTH] = {}, high[DEPTH] = {};
    for (int i = 0; i < DEPTH; ++i) {
        const uint32_t head = first + i * TOGETHER;
        if (head >= heads) break;
        low[i] = load16(row + head * D);
        high[i] = load16(row + head * D + D / 2);
    }
    float cos[VECTOR], sin[VECTOR];
    const float* table = args.cos_sin + static_cast<uint64_t>(args.rope_rows[token]) * D + at;
    load_floats(table, cos);
    load_floats(table + D / 2, sin);
    const float q_scale = args.q_scale != nullptr ? args.q_scale[token] : 1.0f;
    const int32_t slot = args.slots[token];

#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
        const uint32_t head = first + i * TOGETHER;
        const bool is_query = head < args.q_heads, turns = head < rotated;
        float x[2 * VECTOR];
        unpack(low[i], x);
        unpack(high[i], x + VECTOR);
        if (args.q_norm != nullptr) {
            const bf16* weight = is_query ? args.q_norm : args.k_norm;
            norm_head<D>(x, turns ? weight : nullptr, at, args.eps);
        }
        if (turns) {
            const float scale = is_query ? q_scale : 1.0f;
            for (int j = 0; j < VECTOR; ++j) {
                const float a = x[j], b = x[VECTOR + j];
                x[j] = fmaf(a, cos[j], -(b * sin[j])) * scale;
                x[VECTOR + j] = fmaf(b, cos[j], a * sin[j]) * scale;
            }
            low[i] = pack(x);
            high[i] = pack(x + VECTOR);
        }
        if (is_query) {
            store16_global(row + head * D, low[i]);
            store16_global(row + head * D + D / 2, high[i]);
        }
        // Keys are read from the cache alone.
        const bool is_cached = !is_query && head < heads && slot >= 0;
        const bool is_key = head < rotated;
        const uint32_t place = static_cast<uint32_t>(slot), row_in_block = place % BLOCK_TOKENS;
        const uint32_t kv_head = head - (is_key ? args.q_heads : rotated);
        const uint64_t kv_heads = args.kv_heads;
        const uint64_t block = place / BLOCK_TOKENS * kv_heads + kv_head;
        void* const cache = is_key ? args.keys : args.values;
        if (args.fp8 != 0) {
            auto* const codes = static_cast<unsigned char*>(cache) + block * Fp8Block<D>::BYTES;
            store_codes<D>(is_cached ? codes : nullptr, row_in_block, at, low[i], high[i]);
        } else if (is_cached) {
            bf16* const to =
                static_cast<bf16*>(cache) + (block * BLOCK_TOKENS + row_in_block) * D + at;
            store16_global(to, low[i]);
            store16_global(to + D / 2, high[i]);
        }
    }
}

KERNEL(rope_d64, RopeArgs, THREADS, 7) { rotate_and_store<64>(args); }
KERNEL(rope_d128, RopeArgs, THREADS, 7) { rotate_and_store<128>(args); }
