// Products of few tokens with weights of integers of 4 bits: `skinny_linear.cuh`.
#include "skinny_linear.cuh"

using namespace skinny;

SKINNY_KERNELS(int4_g32, Int4<32>)
SKINNY_KERNELS(int4_g64, Int4<64>)
SKINNY_KERNELS(int4_g128, Int4<128>)
