// Causal attention of tiles of rows over the paged cache, on sm_90a's warpgroup products.
//
// A block does one tile of up to 128 rows of one sequence and query head: softmax(Q Kᵀ) V over the
// keys that its rows see, in steps of 128 keys. Shapes, layouts and masks are those of
// `attention_prefill.cu`. Grid: a block a tile and query head, heads first, so that those of a
// group, which read the same keys, run side by side and find them in the L2.
//
// The block is three warpgroups. One brings K and V of each step into two rings of slots, in bf16;
// codes in e4m3 it widens (`prefill_sm90_fp8.cuh`): wgmma takes V along its rows in 16-bit formats
// only. Its registers are handed to the others. Two compute, 64 rows each: S = Q Kᵀ with both from
// shared memory, softmax in registers, O += P V with P in registers, whose layout as S is the
// layout that the second product wants. Two overlaps keep the tensor cores busy while exponentials
// are taken: a warpgroup starts Q Kᵀ of the next step before P V of this one and takes the
// exponentials while P V runs; and the two warpgroups take turns at starting their products. That
// is FlashAttention-3 (Shah et al. 2024, "intra-warpgroup overlap" and "ping-pong"); the online
// softmax in base 2 is FlashAttention-2's. The cache is read by cp.async, 16 bytes a thread, since
// a step's keys are eight blocks anywhere in the pool.
//
// Steps run from the last key to the first, at multiples of 128 from the sequence's start whatever
// the tile: what a row does not see changes no bit of its sums, so its result depends neither on
// the batch nor on how the prompt was cut into chunks.
//
// Counted at D = 128 in bf16, per multiprocessor and step of 128 rows by 128 keys:
//   products            8.4 MFLOP, 2048 cycles at 4096 a cycle
//   exponentials        16384 at 16 a cycle: 1024 cycles, beneath the other warpgroup's products
//   f32 on the side     about 4 an element (scale, maximum, sum, half a pack, 1/128 of O): 600
//   shared memory       32 KiB of Q, 64 of K, 64 of V read by wgmma, 64 written: 1792 cycles
//   from the L2         64 KiB in 2048 cycles: 4.2 KiB a cycle on 132, 7.6 TB/s at the peak and
//                       4.6 at 600 TFLOP/s
// Bound by the tensor cores, shared memory next. The published form of this design, with 132
// multiprocessors and tensor-map copies, comes to 60 to 65 % of the 989 TFLOP/s peak at 8k, causal:
// 590 to 640. Against that stand here cp.async's addresses (about 300 instructions a copying warp
// and step, where a scheduler issues 2048) and no overlap of a tile's end with the next one's
// start (about 3 of 93 thousand cycles at 8k): 560 to 610 is to be expected. Not measured.
//
// Shared memory at D = 128 in bf16: 32 KiB of Q, 3 · 64 of K and V, 96 bytes of barriers: 225 of
// 227 KiB.
// Registers of a computing thread: 64 of O, 64 of S, 32 of P and about 25: 216 are set aside.
#include "prefill_sm90_fp8.cuh"

using namespace prefill_sm90;

// What setmaxnreg gives: (72 + 2 · 216) · 128 of the multiprocessor's 65536.
inline constexpr int COPY_REGISTERS = 72;
inline constexpr int COMPUTE_REGISTERS = 216;
// What a thread starts with; who asks for more than others gave back waits for ever.
inline constexpr int FIRST_REGISTERS = 65536 / THREADS / 8 * 8;
static_assert(COPY_REGISTERS + GROUPS * COMPUTE_REGISTERS <= (1 + GROUPS) * FIRST_REGISTERS);
// Named barriers: the turns of the two computing warpgroups, and each one's own.
inline constexpr int TURN = 1;
inline constexpr int WITHIN = TURN + GROUPS;

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// What a computing thread keeps of its two rows, g and g + 8 of its warp's sixteen.
struct Rows {
    int first[2], last[2];  // keys that they see
    float largest[2];       // of the scores so far
    float sum[2];           // of this thread's share of the weights so far
};

// Waits until a slot is filled. Its rows were written through the generic proxy, and wgmma reads
// through the async proxy: a fence must lie on the way from the write to the read. Who has widened
// e4m3 fences before it arrives. Behind cp.async the copies' arrival makes the writes visible to
// this thread, and the fence, after that, makes them so to the wgmma that the thread takes part in;
// each of the 128 does it for itself. A fence by the copying threads would have to follow the
// landing, for which they then would have to wait.
template <KvFormat format>
DEVICE void wait_filled(Barrier* full, uint32_t parity) {
    barrier_wait(full, parity);
    if (format == KvFormat::BF16) fence_async_proxy();
}

// Gives a slot back: once for each warp, which has waited for its products.
DEVICE void give_back(Barrier* free) {
    if (threadIdx.x % WARP == 0) barrier_arrive(free);
}

// scores = Q Kᵀ, begun.
template <int D>
DEVICE void begin_scores(float (&scores)[STEP_KEYS / 2], uint64_t q, uint64_t keys) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        const int panel = k / 4, within = k % 4 * 32;
        wgmma_shared(scores, wgmma_advance(q, panel * Q_PANEL_BYTES + within),
                     wgmma_advance(keys, panel * KV_PANEL_BYTES + within), k > 0);
    }
    wgmma_commit();
}

// out += P V, begun.
template <int D>
DEVICE void begin_output(float (&out)[D / 2], const uint32_t (&weights)[STEP_KEYS / 16][4],
                         uint64_t values) {
#pragma unroll
    for (int k = 0; k < STEP_KEYS / 16; ++k)
        wgmma_registers(out, weights[k], wgmma_advance(values, k * 2 * PANEL_GROUP_BYTES));
    wgmma_commit();
}

// Scores of keys that a row does not see become minus infinity, whatever they were.
DEVICE void mask(float (&scores)[STEP_KEYS / 2], const Rows& rows, int first_key) {
    const int mine = first_key + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int i = 0; i < STEP_KEYS / 2; ++i) {
        const int key = mine + i / 4 * 8 + i % 2, half = i / 2 % 2;
        const bool seen = key >= rows.first[half] && key <= rows.last[half];
        scores[i] = seen ? scores[i] : minus_infinity();
    }
}

// Scores to weights, and by how much the sums so far shrink.
DEVICE void soften(float (&scores)[STEP_KEYS / 2], Rows& rows, float (&shrink)[2], float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float largest = rows.largest[half];
#pragma unroll
        for (int i = 2 * half; i < STEP_KEYS / 2; i += 4)
            largest = fmaxf(largest, fmaxf(scores[i], scores[i + 1]));
        largest = warp_max<4>(largest);
        // Zero where nothing was seen yet: minus infinity less itself is no number.
        const float base = largest == minus_infinity() ? 0.0f : largest * scale;
        shrink[half] = exp2_approx(rows.largest[half] * scale - base);
        rows.largest[half] = largest;
        float sum = rows.sum[half] * shrink[half];
#pragma unroll
        for (int i = 2 * half; i < STEP_KEYS / 2; i += 4) {
            scores[i] = exp2_approx(scores[i] * scale - base);
            scores[i + 1] = exp2_approx(scores[i + 1] * scale - base);
            sum += scores[i] + scores[i + 1];
        }
        rows.sum[half] = sum;
    }
}

DEVICE void pack(uint32_t (&weights)[STEP_KEYS / 16][4], const float (&scores)[STEP_KEYS / 2]) {
#pragma unroll
    for (int k = 0; k < STEP_KEYS / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            weights[k][i] = pack_bf16(scores[8 * k + 2 * i], scores[8 * k + 2 * i + 1]);
    }
}

// The warpgroup's rows of Q into shared memory, zeros for rows past the tile's.
template <int D>
DEVICE void load_q(const PrefillArgs& args, const PrefillTile& tile, bf16* q, int group) {
    constexpr int CHUNKS = D / 8;
    const int thread = threadIdx.x % WARPGROUP, chunk = thread % CHUNKS;
    const int64_t stride = static_cast<int64_t>(args.q_heads + 2 * args.kv_heads) * D;
    const int rows = tile.rows - group * GROUP_ROWS;
    const bf16* from = args.qkv + tile.first_row * stride + head_of(args) * D + chunk * 8;
    auto* to = reinterpret_cast<unsigned char*>(q) + chunk / 8 * Q_PANEL_BYTES;
#pragma unroll
    for (int pass = 0; pass < GROUP_ROWS; pass += WARPGROUP / CHUNKS) {
        const int row = pass + thread / CHUNKS;
        const bool valid = row < rows;
        const int64_t at = valid ? (group * GROUP_ROWS + row) * stride : 0;
        cp_async_16(to + swizzled(row, chunk % 8), from + at, valid);
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_async_proxy();
    named_barrier(WITHIN + group, WARPGROUP);
}

// Divides by the sums and writes the warp's sixteen rows, by way of shared memory so that each
// thread writes 16 bytes. There, 4 bytes a lane go in, eight rows to different banks.
template <int D>
DEVICE void store(const PrefillArgs& args, const PrefillTile& tile, bf16* staging,
                  const Rows& rows, const float (&out)[D / 2], int group) {
    constexpr int CHUNKS = D / 8;
    const int lane = threadIdx.x % WARP, first = threadIdx.x % WARPGROUP / WARP * 16;
    auto* panels = reinterpret_cast<unsigned char*>(staging);
    // Other warps' products may still be reading Q, which lies here.
    named_barrier(WITHIN + group, WARPGROUP);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float factor = 1.0f / warp_sum<4>(rows.sum[half]);
        const int row = first + lane / 4 + 8 * half;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            auto* to = panels + chunk / 8 * Q_PANEL_BYTES + swizzled(row, chunk % 8) + lane % 4 * 4;
            const int at = 4 * chunk + 2 * half;
            *reinterpret_cast<uint32_t*>(to) = pack_bf16(out[at] * factor, out[at + 1] * factor);
        }
    }
    __syncwarp();
    const int64_t stride = static_cast<int64_t>(args.q_heads) * D;
    const int chunk = lane % CHUNKS;
#pragma unroll
    for (int pass = 0; pass < 16; pass += WARP / CHUNKS) {
        const int row = first + pass + lane / CHUNKS, at = group * GROUP_ROWS + row;
        const auto* from = panels + chunk / 8 * Q_PANEL_BYTES + swizzled(row, chunk % 8);
        bf16* to = args.out + (tile.first_row + at) * stride + head_of(args) * D + chunk * 8;
        if (at < tile.rows) store16_global(to, load16(from));
    }
}

// Leaves the warp's sums of a span.
template <int D>
DEVICE void leave(const PrefillArgs& args, const PrefillTile& tile, const Rows& rows,
                  const float (&out)[D / 2], int group) {
    const int lane = threadIdx.x % WARP, head = head_of(args);
    const int first = group * GROUP_ROWS + threadIdx.x % WARPGROUP / WARP * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = warp_sum<4>(rows.sum[half]);
        const int row = first + 8 * half, place = tile.place + row;
        if (row >= tile.rows) continue;
        float* to = sums_of<D>(args, place, head) + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            store_floats(to + n * 8, out[4 * n + 2 * half], out[4 * n + 2 * half + 1]);
        if (lane % 4 == 0)
            store_floats(weight_of(args, place, head), rows.largest[half] * args.score_scale, sum);
    }
}

template <int D, KvFormat format>
struct Computer {
    static constexpr int SLOT_BYTES = STEP_KEYS * D * static_cast<int>(sizeof(bf16));

    const PrefillArgs& args;
    const PrefillTile& tile;
    Shared<D, format>& shared;
    const int group;
    const Steps steps;
    // The last keys that the warpgroup's first and last row see. Rows past the tile's count as its
    // last one.
    const int first_position, last_position;
    Rows rows;
    Place<Shared<D, format>::SLOTS> key_place, value_place;
    float scores[STEP_KEYS / 2], out[D / 2], shrink[2];
    uint32_t weights[STEP_KEYS / 16][4];

    DEVICE Computer(const PrefillArgs& args, const PrefillTile& tile, Shared<D, format>& shared,
                    int group)
        : args(args),
          tile(tile),
          shared(shared),
          group(group),
          steps(steps_of(tile)),
          first_position(min(tile.position + group * GROUP_ROWS, tile.keys_end - 1)),
          last_position(min(first_position + GROUP_ROWS, tile.keys_end) - 1) {
        const int row = threadIdx.x % WARPGROUP / WARP * 16 + threadIdx.x % WARP / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rows.last[half] = min(first_position + row + 8 * half, tile.keys_end - 1);
            rows.first[half] = rows.last[half] + 1 - args.window;
            rows.largest[half] = minus_infinity();
            rows.sum[half] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    }

    DEVICE void begin_next_scores(uint64_t q, uint64_t keys) {
        wgmma_fence();
        begin_scores<D>(scores, q, wgmma_advance(keys, key_place.slot * SLOT_BYTES));
    }

    DEVICE void begin_next_output(uint64_t values) {
        wait_filled<format>(&shared.value_ring.full[value_place.slot], value_place.parity);
        hold_registers(out);
        hold_registers(weights);
        wgmma_fence();
        begin_output<D>(out, weights, wgmma_advance(values, value_place.slot * SLOT_BYTES));
    }

    // Scores, whose product is done, to weights.
    DEVICE void take_scores(int step) {
        hold_registers(scores);
        give_back(&shared.key_ring.free[key_place.slot]);
        key_place.advance();
        const int first_key = step * STEP_KEYS;
        const bool all_seen = first_key + STEP_KEYS - 1 <= first_position &&
                              first_key > last_position - args.window;
        if (!all_seen) mask(scores, rows, first_key);
        soften(scores, rows, shrink, args.score_scale);
    }

    DEVICE void run() {
        load_q<D>(args, tile, shared.q[group], group);
        const uint64_t q = wgmma_descriptor(shared.q[group], Q_PANEL_BYTES);
        const uint64_t keys = wgmma_descriptor(shared.keys, KV_PANEL_BYTES);
        const uint64_t values = wgmma_descriptor(shared.values, KV_PANEL_BYTES);

        wait_filled<format>(&shared.key_ring.full[0], 0);
        begin_next_scores(q, keys);
        wgmma_wait<0>();
        take_scores(steps.last);
        pack(weights, scores);
        // The first warpgroup begins; at the end nobody has been called who does not come.
        if (group == 1 && steps.count > 1) named_barrier_arrive(TURN, COMPUTING);
        for (int i = 1; i < steps.count; ++i) {
            wait_filled<format>(&shared.key_ring.full[key_place.slot], key_place.parity);
            named_barrier(TURN + group, COMPUTING);
            begin_next_scores(q, keys);
            begin_next_output(values);
            const bool awaited = group == 0 || i + 1 < steps.count;
            if (awaited) named_barrier_arrive(TURN + 1 - group, COMPUTING);
            wgmma_wait<1>();
            take_scores(steps.last - i);
            settle(rows.sum[0] + rows.sum[1], &shared);
            wgmma_wait<0>();
            hold_registers(out);
            give_back(&shared.value_ring.free[value_place.slot]);
            value_place.advance();
#pragma unroll
            for (int j = 0; j < D / 2; ++j) out[j] *= shrink[j / 2 % 2];
            pack(weights, scores);
        }
        begin_next_output(values);
        wgmma_wait<0>();
        hold_registers(out);
        if (tile.place < 0) {
            store<D>(args, tile, shared.q[group], rows, out, group);
        } else {
            leave<D>(args, tile, rows, out, group);
        }
    }
};

template <int D, KvFormat format>
DEVICE void attend(const PrefillArgs& args) {
    auto& shared = *shared_memory<Shared<D, format>>();
    const PrefillTile tile = prefill_tile(args, blockIdx.x / args.q_heads);
    // A span outside the window.
    if (tile.first_key >= tile.keys_stop) return;
    if (threadIdx.x == 0) {
        for (auto* ring : {&shared.key_ring, &shared.value_ring}) {
            for (int slot = 0; slot < shared.SLOTS; ++slot) {
                barrier_init(&ring->full[slot], FILLING<format>);
                barrier_init(&ring->free[slot], COMPUTING / WARP);
            }
        }
    }
    __syncthreads();
    // The same in every lane, and by the shuffle the compiler knows.
    const int warpgroup = __shfl_sync(ALL_LANES, static_cast<int>(threadIdx.x) / WARPGROUP, 0);
    if (warpgroup == 0) {
        registers_shrink<COPY_REGISTERS>();
        bring_steps<D>(args, tile, shared);
    } else {
        registers_grow<COMPUTE_REGISTERS>();
        Computer<D, format>(args, tile, shared, warpgroup - 1).run();
    }
}

template <int D>
DEVICE void attend_bf16(const PrefillArgs& args) { attend<D, KvFormat::BF16>(args); }
template <int D>
DEVICE void attend_fp8(const PrefillArgs& args) { attend<D, KvFormat::FP8>(args); }

HOPPER_KERNEL(attention_prefill_sm90_d64_bf16, PrefillArgs, THREADS, attend_bf16<64>)
HOPPER_KERNEL(attention_prefill_sm90_d64_fp8, PrefillArgs, THREADS, attend_fp8<64>)
HOPPER_KERNEL(attention_prefill_sm90_d128_bf16, PrefillArgs, THREADS, attend_bf16<128>)
HOPPER_KERNEL(attention_prefill_sm90_d128_fp8, PrefillArgs, THREADS, attend_fp8<128>)
