// Products by expert with weights of bf16: `skinny_experts.cuh`.
#include "skinny_experts.cuh"

using namespace skinny;

EXPERTS_KERNELS(bf16, Bf16)
