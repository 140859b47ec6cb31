// ldmatrix and mma.sync: what a warp's lanes bring together, and what each takes away.
#include "races.h"
#include "simt.h"

namespace simt {
namespace {

struct Matrices {
    uint32_t* r;
    const void* row;
};

template <bool transposed>
void load_matrices(void* const (&all)[32], uint32_t) {
    for (int i = 0; i < 4; ++i) {
        uint16_t m[8][8];
        for (int row = 0; row < 8; ++row)
            std::memcpy(m[row], static_cast<Matrices*>(all[i * 8 + row])->row, 16);
        for (int lane = 0; lane < 32; ++lane) {
            const int row = lane / 4, col = lane % 4 * 2;
            const uint16_t low = transposed ? m[col][row] : m[row][col];
            const uint16_t high = transposed ? m[col + 1][row] : m[row][col + 1];
            static_cast<Matrices*>(all[lane])->r[i] = low | static_cast<uint32_t>(high) << 16;
        }
    }
}

struct Product {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

template <bool f16>
float half_of(uint32_t packed, int which) {
    if (f16) return half_to_float(static_cast<uint16_t>(which ? packed >> 16 : packed));
    return bits_to_float(which ? packed & 0xffff0000u : packed << 16);
}

template <bool f16>
void multiply(void* const (&all)[32], uint32_t) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto* p = static_cast<Product*>(all[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 2; ++j)
                a[g + i % 2 * 8][2 * t + i / 2 * 8 + j] = half_of<f16>(p->a[i], j);
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j) b[2 * t + i * 8 + j][g] = half_of<f16>(p->b[i], j);
    }
    for (int lane = 0; lane < 32; ++lane) {
        auto* p = static_cast<Product*>(all[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            float sum = p->d[i];
            for (int k = 0; k < 16; ++k) sum += a[g + i / 2 * 8][k] * b[k][2 * t + i % 2];
            p->d[i] = sum;
        }
    }
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
    Matrices mine{r, aligned(row, 16)};
    races::touch(row, 16, false);
    if (transposed) {
        meet("ldmatrix.trans", 0xffffffffu, &mine, load_matrices<true>);
    } else {
        meet("ldmatrix", 0xffffffffu, &mine, load_matrices<false>);
    }
}

void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product mine{d, a, {b0, b1}};
    meet("mma.m16n8k16", 0xffffffffu, &mine, multiply<false>);
}

void mma_16816_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product mine{d, a, {b0, b1}};
    meet("mma.m16n8k16.f16", 0xffffffffu, &mine, multiply<true>);
}

}  // namespace simt
