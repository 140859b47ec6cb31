// What a measurement needs of the device itself: numbers that no host has to send, and the fastest
// way to read memory, which is the ceiling of every step.
#include "common.cuh"

constexpr int THREADS = 512;
constexpr int VECTOR = 8;
// Vectors that a thread asks for before it uses one: 32 KiB on the way in a block.
constexpr int DEPTH = 4;

struct NoiseArgs {
    bf16* out;
    uint64_t vectors;
    uint64_t seed;
};

// Evenly spread over (-1, 1), by splitmix64 of the place.
DEVICE uint32_t noise_pair(uint64_t at) {
    uint64_t z = at * 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    const float low = static_cast<float>(static_cast<uint32_t>(z) >> 8);
    const float high = static_cast<float>(static_cast<uint32_t>(z >> 40));
    return pack_bf16(low * 0x1p-23f - 1.0f, high * 0x1p-23f - 1.0f);
}

KERNEL(noise_bf16, NoiseArgs, THREADS) {
    const uint64_t at = static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= args.vectors) return;
    Bytes16 v;
    for (int i = 0; i < 4; ++i) v.words[i] = noise_pair((args.seed << 40) + at * 4 + i + 1);
    store16(args.out + at * VECTOR, v);
}

struct ReadArgs {
    uint32_t* out;  // written never, in practice
    const bf16* from;
    uint64_t vectors;
};

// Blocks go through memory side by side, so that all channels are busy.
KERNEL(read_all, ReadArgs, THREADS) {
    uint32_t all = 0;
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * (THREADS * DEPTH);
    const uint64_t mine = static_cast<uint64_t>(blockIdx.x) * (THREADS * DEPTH) + threadIdx.x;
    for (uint64_t first = mine; first < args.vectors; first += step) {
        Bytes16 v[DEPTH] = {};
        for (int i = 0; i < DEPTH; ++i) {
            const uint64_t at = first + i * THREADS;
            if (at < args.vectors) v[i] = load16_stream(args.from + at * VECTOR);
        }
        for (int i = 0; i < DEPTH; ++i)
            all ^= v[i].words[0] ^ v[i].words[1] ^ v[i].words[2] ^ v[i].words[3];
    }
    // Else the compiler leaves the reads out.
    if (all == 0x5bd1e995u) *args.out = all;
}
