// silu(gate) · up, by the same instructions wherever it is made: after a product or within it.
#pragma once

#include "common.cuh"

// x / (1 + exp(-x)), from exp(-|x|), which cannot overflow.
DEVICE float silu(float x) {
    const float e = __expf(-fabsf(x));
    return x * __fdividef(x < 0.0f ? e : 1.0f, 1.0f + e);
}

// Of two gates and two ups in bf16; one rounding.
DEVICE uint32_t silu_mul(uint32_t gate, uint32_t up) {
    return pack_bf16(silu(low_bf16(gate)) * low_bf16(up), silu(high_bf16(gate)) * high_bf16(up));
}
