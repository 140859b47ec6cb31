// Ops that move or combine rows of bf16: add, silu_mul, and the gather behind embed and
// gather_rows.
//
// All are bound by memory. A thread moves two vectors of 16 bytes, a block apart, and asks for both
// before it uses either: at full occupancy an SM then has 64 KiB of reads on the way from one
// input, more than twice what latency × bandwidth asks for on Hopper (about 25 KiB). Rows lie one
// behind another, so vectors are numbered through and no row length leaves threads idle.
#include "common.cuh"
#include "silu.cuh"

constexpr int THREADS = 256;
// Elements of a vector.
constexpr int VECTOR = 8;
// Vectors of a thread, THREADS apart.
constexpr int DEPTH = 2;

// This thread's first vector of all.
DEVICE uint64_t first_vector() {
    return static_cast<uint64_t>(blockIdx.x) * (THREADS * DEPTH) + threadIdx.x;
}

// x [elements] += delta [elements]. Moves 6 bytes an element.
struct AddArgs {
    bf16* x;
    const bf16* delta;
    uint64_t vectors;
};

KERNEL(add_bf16, AddArgs, THREADS) {
    follow_launches();
    const uint64_t first = first_vector();
    Bytes16 x[DEPTH] = {}, delta[DEPTH] = {};
    for (int i = 0; i < DEPTH; ++i) {
        const uint64_t at = first + i * THREADS;
        if (at >= args.vectors) break;
        x[i] = load16(args.x + at * VECTOR);
        delta[i] = load16_stream(args.delta + at * VECTOR);
    }
    for (int i = 0; i < DEPTH; ++i) {
        const uint64_t at = first + i * THREADS;
        if (at >= args.vectors) break;
        for (int w = 0; w < 4; ++w) {
            const uint32_t a = x[i].words[w], b = delta[i].words[w];
            x[i].words[w] = pack_bf16(low_bf16(a) + low_bf16(b), high_bf16(a) + high_bf16(b));
        }
        store16(args.x + at * VECTOR, x[i]);
    }
}

// out [T, I] = silu(gate) · up, x [T, 2 I]: gate, then up; one rounding. Moves 6 bytes an element.
// Two special functions an element keep that unit less than half busy at full bandwidth.
struct SiluMulArgs {
    bf16* out;
    const bf16* x;
    uint32_t vectors;      // of out
    uint32_t row_vectors;  // I / 8
};

KERNEL(silu_mul_bf16, SiluMulArgs, THREADS) {
    follow_launches();
    const uint32_t first = static_cast<uint32_t>(first_vector());
    Bytes16 gate[DEPTH] = {}, up[DEPTH] = {};
    for (int i = 0; i < DEPTH; ++i) {
        const uint32_t at = first + i * THREADS;
        if (at >= args.vectors) break;
        const uint64_t row = at / args.row_vectors;
        const bf16* from = args.x + (at + row * args.row_vectors) * VECTOR;
        gate[i] = load16_stream(from);
        up[i] = load16_stream(from + static_cast<uint64_t>(args.row_vectors) * VECTOR);
    }
    for (int i = 0; i < DEPTH; ++i) {
        const uint32_t at = first + i * THREADS;
        if (at >= args.vectors) break;
        for (int w = 0; w < 4; ++w) {
            const uint32_t g = gate[i].words[w], u = up[i].words[w];
            gate[i].words[w] = silu_mul(g, u);
        }
        store16(args.out + static_cast<uint64_t>(at) * VECTOR, gate[i]);
    }
}

// out [R, H] = row `rows[r] - first` of table [table_rows, H]; zeros where that is outside the
// table, which then is not read. Moves 4 bytes an element.
struct GatherArgs {
    bf16* out;
    const bf16* table;
    const int32_t* rows;
    int64_t first;
    uint64_t table_rows;
    uint32_t vectors;      // of out
    uint32_t row_vectors;  // H / 8
};

KERNEL(gather_bf16, GatherArgs, THREADS) {
    const uint32_t first = static_cast<uint32_t>(first_vector());
    Bytes16 moved[DEPTH] = {};
    for (int i = 0; i < DEPTH; ++i) {
        const uint32_t at = first + i * THREADS;
        if (at >= args.vectors) break;
        const uint32_t r = at / args.row_vectors;
        const uint32_t col = at - r * args.row_vectors;
        // As unsigned, a row before the table's first is far behind its last.
        const uint64_t row = static_cast<uint64_t>(args.rows[r] - args.first);
        if (row < args.table_rows)
            moved[i] = load16_stream(args.table + (row * args.row_vectors + col) * VECTOR);
    }
    for (int i = 0; i < DEPTH; ++i) {
        const uint32_t at = first + i * THREADS;
        if (at >= args.vectors) break;
        store16(args.out + static_cast<uint64_t>(at) * VECTOR, moved[i]);
    }
}
