// What the prefill kernels share: their argument, and what a block finds out about its tile.
#pragma once

#include "common.cuh"

// Rows of one sequence that a block works on; `TILE_ROWS` of the launchers.
constexpr int TILE_ROWS = 128;

struct PrefillArgs {
    bf16* out;                    // [T, q heads · D]
    const bf16* qkv;              // [T, (q heads + 2 kv heads) · D]
    const void* keys;             // [blocks, kv heads, 16, D], or of `Fp8Block`s
    const void* values;           // as keys
    const int32_t* tiles;         // [tiles, 2]: sequence, and its first row in the batch
    const int32_t* row_starts;    // [S + 1]
    const int32_t* context_lens;  // [S]
    const int32_t* tables;        // [S]: rows of block_tables
    const int32_t* block_tables;  // [.., block_table_cols]
    int32_t block_table_cols;
    int32_t q_heads;
    int32_t kv_heads;
    int32_t window;     // keys that a row sees, itself included; 2^30 for all
    float score_scale;  // log2(e) / sqrt(D)
};

// Positions count from the start of the sequence.
struct PrefillTile {
    int first_row;          // in the batch
    int rows;               // 1 to TILE_ROWS
    int position;           // of the first row
    int first_key;          // that some row sees
    int keys_end;           // one past the last key that some row sees
    const int32_t* blocks;  // of the sequence; those before keys_end may be read
};

DEVICE PrefillTile prefill_tile(const PrefillArgs& args, int index) {
    const int sequence = args.tiles[2 * index];
    PrefillTile tile;
    tile.first_row = args.tiles[2 * index + 1];
    const int rows_left = args.row_starts[sequence + 1] - tile.first_row;
    tile.rows = min(rows_left, TILE_ROWS);
    tile.position = args.context_lens[sequence] - rows_left;
    tile.first_key = max(tile.position + 1 - args.window, 0);
    tile.keys_end = tile.position + tile.rows;
    const int64_t table = args.tables[sequence];
    tile.blocks = args.block_tables + table * args.block_table_cols;
    return tile;
}
