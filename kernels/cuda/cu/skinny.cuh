// Weights in records, for products of few tokens and their unpacking.
//
// W [N, K] is cut into strips of 64 rows, a strip into records of 128 columns (bf16: 64), which lie
// one after another; rows and columns past the last are zero. A record:
//   numbers  [slots of 32 columns][2 halves of 32 rows][chunks][32 lanes][16 bytes]
//   factors  int4 only: [128 / group][2 halves][8][4 words]: f16 scale below, bf16 128 + zero above
// So a lane's 16 bytes have no bank conflicts, and one copy of consecutive bytes moves a record.
//
// They are A fragments of mma.m16n8k16: two matrices m of 16 rows, two steps s of 16 columns. Which
// row and which column the hardware calls which is free as long as all sides agree. Here lane l
// with g = l / 4 and t = l % 4 has of a half rows 4 g + 2 m + r (r = 1: what the hardware calls
// g + 8), and of a slot columns 8 t + 4 s to 8 t + 4 s + 3. So its B fragments of a slot are 16
// consecutive bytes of a row of x, and its sums of a token four consecutive rows.
//
//   bf16: chunk 2 m + s is the fragment
//   e4m3: chunk m, word 2 s + r: four columns of a row. A scale for each row, beside the records
//   int4: one chunk, word 2 m + s: nibble i register i's even column, nibble i + 4 its odd one.
//         Factor word 2 m + r of place g is of row 4 g + 2 m + r
//
// Bytes an element: 2; 1; (64 + 4 · 128 / group) / 128, at 128 0.53.
//
// Of a matrix of two halves with `pairs` rows each, gate and up, the rows may lie in turn: 2 i is
// gate's row i, 2 i + 1 up's. Then a lane has both of what silu(gate) · up takes.
//
// Integers become bf16 by the magic-number trick of Kim et al. (Who Says Elephants Can't Run): an
// integer below 128 in the mantissa of 0x4300 is 128 + q exactly, of which 128 + zero is subtracted
// exactly. 44 integer and packed instructions for 32 weights; e4m3 takes 64 on Hopper.
#pragma once

#include "common.cuh"

namespace skinny {

constexpr int STRIP = 64;
// Rows that a warp multiplies.
constexpr int HALF = STRIP / 2;
constexpr int SLOT_COLS = 32;
// 16 bytes a lane.
constexpr int CHUNK_BYTES = WARP * 16;

// Rows of a half that a lane has, one after another: of matrix 0, then of matrix 1.
constexpr int LANE_ROWS = 4;

// Where row `row` of a matrix lies; `pairs` is 0 where rows lie as they are.
DEVICE uint32_t row_in_records(uint32_t row, uint32_t pairs) {
    if (pairs == 0) return row;
    return row < pairs ? 2 * row : 2 * (row - pairs) + 1;
}

// The row of the matrix that lies at `row`; itself past the last.
DEVICE uint32_t row_of_matrix(uint32_t row, uint32_t pairs) {
    return row < 2 * pairs ? row % 2 * pairs + row / 2 : row;
}

struct Bf16 {
    static constexpr int COLS = 64;
    static constexpr int CHUNKS = 4;
    // Columns with one scale that sums of products are multiplied by.
    static constexpr int GROUP = COLS;
    static constexpr bool SCALED = false;
    static constexpr int BYTES = STRIP * COLS * 2;

    // What a lane needs of a group beside numbers.
    struct Factors {
        DEVICE Factors(const unsigned char*, int, int) {}
        DEVICE float scale(int, int) const { return 1.0f; }
    };

    static DEVICE void fragment(uint32_t (&a)[4], const Bytes16 (&chunks)[CHUNKS], const Factors&,
                                int m, int s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = chunks[2 * m + s].words[i];
    }
};

struct E4m3 {
    static constexpr int COLS = 128;
    static constexpr int CHUNKS = 2;
    static constexpr int GROUP = COLS;
    static constexpr bool SCALED = false;
    static constexpr int BYTES = STRIP * COLS;
    using Factors = Bf16::Factors;

    static DEVICE void fragment(uint32_t (&a)[4], const Bytes16 (&chunks)[CHUNKS], const Factors&,
                                int m, int s) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            uint32_t pairs[2];
            fp8x4_to_bf16(chunks[m].words[2 * s + r], pairs);
            a[r] = pairs[0];
            a[2 + r] = pairs[1];
        }
    }
};

template <int group>
struct Int4 {
    static constexpr int COLS = 128;
    static constexpr int CHUNKS = 1;
    static constexpr int GROUP = group;
    static constexpr bool SCALED = true;
    static constexpr int NUMBER_BYTES = STRIP * COLS / 2;
    static constexpr int GROUP_BYTES = STRIP * 4;
    static constexpr int BYTES = NUMBER_BYTES + COLS / group * GROUP_BYTES;

    struct Factors {
        Bytes16 of_rows;

        DEVICE Factors(const unsigned char* record, int group_at, int half)
            : of_rows(load16(record + NUMBER_BYTES + group_at * GROUP_BYTES +
                             half * (GROUP_BYTES / 2) + threadIdx.x % WARP / 4 * 16)) {}
        // Of row 4 g + 2 m + r.
        DEVICE float scale(int m, int r) const { return half_to_float(of_rows.words[2 * m + r]); }
        // 128 + zero, twice.
        DEVICE uint32_t biased_zero(int m, int r) const {
            const uint32_t factor = of_rows.words[2 * m + r];
            return (factor & 0xffff0000u) | factor >> 16;
        }
    };

    static DEVICE void fragment(uint32_t (&a)[4], const Bytes16 (&chunks)[CHUNKS],
                                const Factors& factors, int m, int s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t word = chunks[0].words[2 * m + s];
            const uint32_t biased = and_or<0x000f000fu, 0x43004300u>(word >> 4 * i);
            a[i] = sub_bf16x2(biased, factors.biased_zero(m, i % 2));
        }
    }
};

DEVICE void store_word(void* to, uint32_t word) {
#ifdef LOCKSTEP_EMULATE
    *reinterpret_cast<uint32_t*>(const_cast<void*>(simt::aligned(to, 4))) = word;
#else
    *reinterpret_cast<uint32_t*>(to) = word;
#endif
}

// Where a lane's chunks of a slot and half begin.
template <class Format>
DEVICE const unsigned char* lane_chunks(const unsigned char* record, int slot, int half) {
    return record + (slot * 2 + half) * Format::CHUNKS * CHUNK_BYTES + threadIdx.x % WARP * 16;
}

// Records that hold `cols` columns.
template <class Format>
constexpr int RECORDS_A_STEP = 128 / Format::COLS;

}  // namespace skinny
