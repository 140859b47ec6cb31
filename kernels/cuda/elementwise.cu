// Ops that move or combine rows of bf16. All are bound by memory: 16 bytes a thread and load.
#include "common.cuh"

// x [elements] += delta [elements]. Moves 6 bytes an element.
struct AddArgs {
    bf16* x;
    const bf16* delta;
    uint64_t elements;  // a multiple of 8
};

KERNEL(add_bf16, AddArgs, 256) {
    const uint64_t at = (static_cast<uint64_t>(blockIdx.x) * 256 + threadIdx.x) * 8;
    if (at >= args.elements) return;
    Bytes16 x = load16(args.x + at);
    const Bytes16 delta = load16_stream(args.delta + at);
    for (int i = 0; i < 4; ++i) {
        x.words[i] = pack_bf16(low_bf16(x.words[i]) + low_bf16(delta.words[i]),
                               high_bf16(x.words[i]) + high_bf16(delta.words[i]));
    }
    store16(args.x + at, x);
}
