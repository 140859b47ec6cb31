// What becomes of one head of a packed row on its way to attention and into the cache, by D / 16
// lanes, each with 8 elements of the lower half and the 8 that they are paired with, so that
// nothing is exchanged but the norm's sum. Whoever turns a head does it by these steps, in this
// order: then the bits are the same.
#pragma once

#include "common.cuh"

namespace rope {

// Elements of 16 bytes.
constexpr int LANE_VECTOR = 8;

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

DEVICE void load_floats(const float* from, float (&x)[LANE_VECTOR]) {
    for (int i = 0; i < 2; ++i) {
        const Bytes16 four = load16(from + 4 * i);
        for (int j = 0; j < 4; ++j) x[4 * i + j] = __uint_as_float(four.words[j]);
    }
}

// A lane's part of a head: elements `at`.. of the lower half, and those of the upper one.
struct HeadPart {
    Bytes16 low = {}, high = {};

    template <int D>
    DEVICE void load(const bf16* at) {
        low = load16(at);
        high = load16(at + D / 2);
    }

    // To global memory.
    template <int D>
    DEVICE void store(bf16* at) const {
        store16_global(at, low);
        store16_global(at + D / 2, high);
    }

    DEVICE void unpack_to(float (&x)[2 * LANE_VECTOR]) const {
        unpack(low, x);
        unpack(high, x + LANE_VECTOR);
    }
};

// The same for a head in e4m3: codes and the scale of the whole head.
struct CodedPart {
    Bytes8 low, high;
    float scale;

    template <int D>
    DEVICE void store(unsigned char* codes, int at, float* scale_at) const {
        store8(codes + at, low);
        store8(codes + at + D / 2, high);
        if (at == 0) *scale_at = scale;
    }
};

// Scales the head that D / 16 lanes hold together. All lanes of the warp come here; those whose
// `weight` is null have no head to scale.
template <int D>
DEVICE void norm_head(float (&x)[2 * LANE_VECTOR], const bf16* weight, int at, float eps) {
    float sum = 0.0f;
    for (int i = 0; i < 2 * LANE_VECTOR; ++i) sum = fmaf(x[i], x[i], sum);
    sum = warp_sum<D / 16>(sum);
    if (weight == nullptr) return;
    const float factor = rsqrtf(sum * (1.0f / D) + eps);
    float by[2 * LANE_VECTOR];
    unpack(load16(weight + at), by);
    unpack(load16(weight + D / 2 + at), by + LANE_VECTOR);
    for (int i = 0; i < 2 * LANE_VECTOR; ++i) x[i] = x[i] * factor * by[i];
}

// What turning rows takes beside them; the launcher's `Turn`.
struct TurnArgs {
    const float* cos_sin;
    const bf16* q_norm;        // [D], or null and k_norm too
    const bf16* k_norm;        // [D]
    const int32_t* rope_rows;  // [tokens]
    const int32_t* slots;      // [tokens], negative for those that are not stored
    const float* q_scale;      // [tokens], or null
    float eps;
    uint32_t unused;
};

enum class Head { QUERY, KEY, OTHER };  // values, and lanes without a head, stay as they are

// A lane's part of what a token's heads are turned by.
struct Turn {
    const TurnArgs& args;
    float cos[LANE_VECTOR], sin[LANE_VECTOR];
    float q_scale;
    int at;  // the lane's elements

    template <int D>
    DEVICE static Turn of(const TurnArgs& args, uint32_t token, int at) {
        Turn turn{args, {}, {}, args.q_scale != nullptr ? args.q_scale[token] : 1.0f, at};
        const float* row = args.cos_sin + static_cast<uint64_t>(args.rope_rows[token]) * D + at;
        load_floats(row, turn.cos);
        load_floats(row + D / 2, turn.sin);
        return turn;
    }

    // Norm, rotation (element i with i + D/2) and scale of a head, rounded once. All lanes of the
    // warp come here.
    template <int D>
    DEVICE void apply(HeadPart& part, Head head) const {
        float x[2 * LANE_VECTOR];
        part.unpack_to(x);
        if (args.q_norm != nullptr) {
            const bf16* weight = head == Head::QUERY ? args.q_norm : args.k_norm;
            norm_head<D>(x, head != Head::OTHER ? weight : nullptr, at, args.eps);
        }
        if (head == Head::OTHER) return;
        const float scale = head == Head::QUERY ? q_scale : 1.0f;
        for (int j = 0; j < LANE_VECTOR; ++j) {
            const float a = x[j], b = x[LANE_VECTOR + j];
            x[j] = fmaf(a, cos[j], -(b * sin[j])) * scale;
            x[LANE_VECTOR + j] = fmaf(b, cos[j], a * sin[j]) * scale;
        }
        part.low = pack(x);
        part.high = pack(x + LANE_VECTOR);
    }
};

// 8 elements · factor as e4m3.
DEVICE Bytes8 quantize(const float (&x)[2 * LANE_VECTOR], int first, float factor) {
    float by[LANE_VECTOR];
    for (int i = 0; i < LANE_VECTOR; ++i) by[i] = x[first + i] * factor;
    const float low[4] = {by[0], by[1], by[2], by[3]}, high[4] = {by[4], by[5], by[6], by[7]};
    return {{pack_fp8x4(low), pack_fp8x4(high)}};
}

// A head's largest element becomes 448; zeros have a scale of 1. All lanes of the warp come here.
template <int D>
DEVICE CodedPart coded(const HeadPart& part) {
    float x[2 * LANE_VECTOR];
    part.unpack_to(x);
    float most = 0.0f;
    for (int i = 0; i < 2 * LANE_VECTOR; ++i) most = fmaxf(most, fabsf(x[i]));
    most = warp_max<D / 16>(most);
    const float factor = most > 0.0f ? FP8_MAX / most : 1.0f;
    return {quantize(x, 0, factor), quantize(x, LANE_VECTOR, factor),
            most > 0.0f ? most * (1.0f / FP8_MAX) : 1.0f};
}

// Where a token's key or value of a head lies in the cache [blocks, kv heads, 16, D].
template <int D>
struct CachePlace {
    uint64_t block;
    uint32_t row;

    DEVICE CachePlace(int32_t slot, uint32_t kv_heads, uint32_t kv_head)
        : block(static_cast<uint64_t>(static_cast<uint32_t>(slot) / BLOCK_TOKENS) * kv_heads +
                kv_head),
          row(static_cast<uint32_t>(slot) % BLOCK_TOKENS) {}

    DEVICE void store(void* cache, const HeadPart& part, int at) const {
        part.store<D>(static_cast<bf16*>(cache) + (block * BLOCK_TOKENS + row) * D + at);
    }

    DEVICE void store(void* cache, const CodedPart& part, int at) const {
        auto* const codes = static_cast<unsigned char*>(cache) + block * Fp8Block<D>::BYTES;
        auto* const scales = reinterpret_cast<float*>(codes + Fp8Block<D>::CODES);
        part.store<D>(codes + row * D, at, scales + row);
    }
};

}  // namespace rope
