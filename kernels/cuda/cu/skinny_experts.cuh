// Products by pair of token and expert, by the kernel of `skinny_linear.cuh`. What pairs and places
// are: `routing.rs`.
//
// out [pairs, N] by place = x · W[expert] [N, K]ᵀ (· scale of the row); of gates and ups in turn,
// out [pairs, N / 2] = silu(gate) · up. Experts' records lie one behind another. A unit is a tile
// of an expert, whole along K, for up to 64 of the expert's places; an expert with more has several
// units of each tile, side by side, which find its records in the L2. A place's bits depend on
// nothing but its row of x.
//
// How many places an expert has only the device knows: each block counts all units before it
// begins. The grid is one for all choices; a block whose first unit is not there ends.
//
// Nothing comes ahead of the launches before: those choose the experts. The second product of a
// layer knows no more, since the launch that sorts may still run when it begins.
#pragma once

#include "skinny_linear.cuh"

namespace skinny {

struct ExpertsArgs {
    SkinnyArgs product;  // its weight and scales are those of the first expert; no parts
    const int32_t* pairs;   // [pairs]
    const int32_t* starts;  // [experts + 1]
    uint32_t experts;
    uint32_t pairs_of;  // pairs with one row of x: k, or 0 where x has a row for each place
};

template <class Weights, int most>
struct Experts {
    using Args = ExpertsArgs;
    using Format = Weights;
    static constexpr int TOKENS = most;
    static constexpr bool KNOWN_AHEAD = false;
    const SkinnyArgs& args;
    const ExpertsArgs& all;
    // Behind the ring: [experts + 1] where each expert's units begin, and its places.
    uint32_t* first_unit;
    uint32_t* starts;

    DEVICE explicit Experts(const ExpertsArgs& all) : args(all.product), all(all) {
        unsigned char* ring = shared_memory<unsigned char>() + HEAD_BYTES;
        first_unit = reinterpret_cast<uint32_t*>(ring + args.stages * STAGE_BYTES<Format, TOKENS>);
        starts = first_unit + all.experts + 1;
    }

    // One warp counts, while none of the others has anything to do.
    DEVICE void begin() const {
        wait_prerequisites();
        if (threadIdx.x >= WARP) return;
        const uint32_t lane = threadIdx.x, tiles = tiles_of(args);
        uint32_t before = 0;
#pragma unroll 4
        for (uint32_t base = 0; base <= all.experts; base += WARP) {
            const uint32_t expert = base + lane;
            const uint32_t start = place_of(expert), end = place_of(expert + 1);
            const uint32_t units = walks(end - start) * tiles;
            const uint32_t upto = before + warp_prefix(units);
            if (expert <= all.experts) {
                first_unit[expert] = upto - units;
                starts[expert] = start;
            }
            before = __shfl_sync(ALL_LANES, upto, WARP - 1);
        }
    }

    DEVICE uint32_t units() const { return first_unit[all.experts]; }

    // By a whole warp.
    DEVICE Unit unit(uint32_t index) const {
        // Of the experts whose units begin at `index` or before, the last: it has some.
        uint32_t expert = 0;
        for (uint32_t base = 0; base < all.experts; base += WARP) {
            const uint32_t other = base + threadIdx.x % WARP;
            const bool begun = other < all.experts && first_unit[other] <= index;
            expert += __popc(__ballot_sync(ALL_LANES, begun));
        }
        --expert;
        const uint32_t start = starts[expert], places = starts[expert + 1] - start;
        const uint32_t at = index - first_unit[expert];
        const uint32_t first = at % walks(places) * TOKENS;
        Unit unit = unit_of<Format>(args, at / walks(places));
        unit.tokens = min(places - first, static_cast<uint32_t>(TOKENS));
        unit.place = start + first;
        unit.weight = expert;
        return unit;
    }

    struct Rows {
        uint32_t rows[TOKENS / 8] = {};

        DEVICE void begin(const Experts& walk, const Unit& unit) {
#pragma unroll
            for (uint32_t i = 0; i < TOKENS / 8; ++i) {
                const uint32_t token = i * 8 + threadIdx.x % WARP / 4, place = unit.place + token;
                rows[i] = 0;
                if (token >= unit.tokens) continue;
                const uint32_t k = walk.all.pairs_of;
                rows[i] = k == 0 ? place : static_cast<uint32_t>(walk.all.pairs[place]) / k;
            }
        }

        DEVICE uint32_t of(int eight) const { return rows[eight]; }
    };

private:
    // How often an expert with so many places is walked.
    DEVICE static uint32_t walks(uint32_t places) { return (places + TOKENS - 1) / TOKENS; }

    // Where the places of an expert begin; those behind the last where there is no such.
    DEVICE uint32_t place_of(uint32_t expert) const {
        return static_cast<uint32_t>(all.starts[min(expert, all.experts)]);
    }
};

}  // namespace skinny

// The kernels of a format. Each file of them is compiled on its own.
#define EXPERTS_KERNEL(name, Format, tokens)                                \
    KERNEL(expert_linear_##name##_t##tokens, ExpertsArgs, THREADS, 1) {     \
        skinny_product<Experts<Format, tokens>>(args);                      \
    }
#define EXPERTS_KERNELS(name, Format)  \
    EXPERTS_KERNEL(name, Format, 8)    \
    EXPERTS_KERNEL(name, Format, 16)   \
    EXPERTS_KERNEL(name, Format, 32)   \
    EXPERTS_KERNEL(name, Format, 64)
