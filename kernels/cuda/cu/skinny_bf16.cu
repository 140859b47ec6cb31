// Products of few tokens with weights of bf16: `skinny_linear.cuh`.
#include "skinny_linear.cuh"

using namespace skinny;

SKINNY_KERNELS(bf16, Bf16)
