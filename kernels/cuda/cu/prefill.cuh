// What the prefill kernels share: their argument, and what a block finds out about its tile.
//
// A tile of few rows behind a long context would keep few blocks at work for long: a sequence of up
// to TILE_ROWS rows is cut along its keys into spans, at multiples of the span from its start. A
// block does one span of the tile and leaves f32 sums, and `attention_combine.cu` adds them in the
// order of the spans. Whether and where is cut follows from the sequence's own rows and context.
// The fewer rows, the shorter the spans: sums are 4 (D + 2) bytes a row, head and span, written and
// read once, against 4 D a key that a span reads (2 D in e4m3): 6 % at 32 rows of bf16 and at 128.
// Spans of 1024 keys make 28 heads behind 8k tokens 224 blocks.
#pragma once

#include "common.cuh"

// Rows of one sequence that a block works on; `TILE_ROWS` of the launchers.
constexpr int TILE_ROWS = 128;

struct PrefillArgs {
    bf16* out;                    // [T, q heads · D]
    const bf16* qkv;              // [T, (q heads + 2 kv heads) · D]
    const void* keys;             // [blocks, kv heads, 16, D], or of `Fp8Block`s
    const void* values;           // as keys
    const int32_t* tiles;         // [tiles, 4]: sequence, its first row in the batch, span, place
                                  // of the sequence's sums, below zero where it is not cut
    const int32_t* row_starts;    // [S + 1]
    const int32_t* context_lens;  // [S]
    const int32_t* tables;        // [S]: rows of block_tables
    const int32_t* block_tables;  // [.., block_table_cols]
    float* sums;                  // [places, q heads, D]: Σ 2^(score - largest) · value
    float* weights;               // [places, q heads, 2]: largest score, Σ 2^(score - largest)
    int32_t block_table_cols;
    int32_t q_heads;
    int32_t kv_heads;
    int32_t window;      // keys that a row sees, itself included; 2^30 for all
    int32_t first_tile;  // of this launch
    float score_scale;   // log2(e) / sqrt(D)
};

// Positions count from the start of the sequence.
struct PrefillTile {
    int first_row;          // in the batch
    int rows;               // 1 to TILE_ROWS
    int position;           // of the first row
    int first_key;          // that some row sees, in this block's span
    int keys_stop;          // one past the last of the span; no more than first_key: nothing to do
    int keys_end;           // one past the last key that some row sees
    int place;              // of the first row's sums; below zero where the block finishes rows
    const int32_t* blocks;  // of the sequence; those before keys_end may be read
};

// Keys of a span of so many rows; `span_keys` of the launchers.
DEVICE int span_keys(int rows) { return rows <= 32 ? 1024 : rows <= 64 ? 2048 : 4096; }

// The first and the last span that some row of a cut sequence sees.
struct Spans {
    int first, last;
};

DEVICE Spans spans_of(int rows, int first_key, int keys_end) {
    const int keys = span_keys(rows);
    return {first_key / keys, (keys_end - 1) / keys};
}

DEVICE PrefillTile prefill_tile(const PrefillArgs& args, int index) {
    const int32_t* entry = args.tiles + 4 * static_cast<int64_t>(args.first_tile + index);
    const int sequence = entry[0], span = entry[2], place = entry[3];
    PrefillTile tile;
    tile.first_row = entry[1];
    const int rows_left = args.row_starts[sequence + 1] - tile.first_row;
    tile.rows = min(rows_left, TILE_ROWS);
    tile.position = args.context_lens[sequence] - rows_left;
    tile.first_key = max(tile.position + 1 - args.window, 0);
    tile.keys_end = tile.keys_stop = tile.position + tile.rows;
    tile.place = -1;
    if (place >= 0) {
        const Spans spans = spans_of(tile.rows, tile.first_key, tile.keys_end);
        const int keys = span_keys(tile.rows);
        // A window may leave one span alone.
        if (spans.first < spans.last) tile.place = place + span * tile.rows;
        tile.first_key = max(tile.first_key, span * keys);
        tile.keys_stop = min(tile.keys_end, (span + 1) * keys);
    }
    const int64_t table = args.tables[sequence];
    tile.blocks = args.block_tables + table * args.block_table_cols;
    return tile;
}

// Where a row of a cut tile leaves its sums, and their weight.
template <int D>
DEVICE float* sums_of(const PrefillArgs& args, int place, int head) {
    return args.sums + (static_cast<int64_t>(place) * args.q_heads + head) * D;
}
DEVICE float* weight_of(const PrefillArgs& args, int place, int head) {
    return args.weights + (static_cast<int64_t>(place) * args.q_heads + head) * 2;
}

DEVICE void store_floats(float* to, float first, float second) {
    store8(to, {{__float_as_uint(first), __float_as_uint(second)}});
}
