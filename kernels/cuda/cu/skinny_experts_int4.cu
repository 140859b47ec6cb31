// Products by expert with weights of integers of 4 bits: `skinny_experts.cuh`.
#include "skinny_experts.cuh"

using namespace skinny;

EXPERTS_KERNELS(int4_g32, Int4<32>)
EXPERTS_KERNELS(int4_g64, Int4<64>)
EXPERTS_KERNELS(int4_g128, Int4<128>)
