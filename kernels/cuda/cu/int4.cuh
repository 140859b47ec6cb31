// 4-bit weights, scaled by groups of columns (GPTQ, AWQ): W[n, k] = (q - zero) scale.
//
// Layout (made once, `int4/pack.rs`). W is cut into strips of 64 rows and stages of 128 columns; a
// strip's stages lie one after another. One of them is a record:
//   weights  [4 slots of 32 columns][2 halves of 32 rows][32 lanes][4 words of 8 nibbles]
//   factors  [128 / group][2 halves][8][4 words]: f16 scale below, bf16 128 + zero above
// A lane's 16 bytes of a slot are its A fragments of four mma.m16n8k16: word 2 m + s is step s of
// the 16-row matrix m, nibble i its register i's even column, nibble i + 4 the odd one. Lane l with
// g = l / 4 and t = l % 4 has rows 16 m + g and 16 m + g + 8. Which column of W the hardware calls
// k is free as long as both factors agree: here lane t's are 8 t to 8 t + 7, four a step, so that
// its B fragments of a slot are 16 consecutive bytes of a row of x. Factor word 2 m + r of place g
// belongs to row 16 m + g + 8 r. Bytes an element: (64 + 4 · 128 / group) / 128; 0.53 at 128.
//
// Dequantisation (the magic-number trick of Kim et al., Who Says Elephants Can't Run, for bf16): an
// integer below 128 in the mantissa of 0x4300 is 128 + q exactly, of which 128 + zero is subtracted
// exactly. 44 integer and packed instructions for 32 weights.
#pragma once

#include "common.cuh"

namespace int4_weights {

constexpr int STRIP = 64;
constexpr int STAGE_COLS = 128;
constexpr int SLOT_COLS = 32;
constexpr int STRIP_BYTES = STRIP * STAGE_COLS / 2;
constexpr int SLOT_BYTES = STRIP * SLOT_COLS / 2;
constexpr int FACTOR_BYTES = STRIP * 4;

template <int group>
constexpr int RECORD = STRIP_BYTES + STAGE_COLS / group * FACTOR_BYTES;

// The A fragment that a word holds, with 128 + zero of its upper and of its lower row in both
// halves.
DEVICE void dequantize(uint32_t (&a)[4], uint32_t word, uint32_t upper, uint32_t lower) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t biased = and_or<0x000f000fu, 0x43004300u>(word >> 4 * i);
        a[i] = sub_bf16x2(biased, i % 2 == 0 ? upper : lower);
    }
}

// The upper half of a factor word, twice.
DEVICE uint32_t biased_zero(uint32_t factor) { return (factor & 0xffff0000u) | factor >> 16; }

}  // namespace int4_weights
