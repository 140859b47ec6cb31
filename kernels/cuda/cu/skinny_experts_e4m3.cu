// Products by expert with weights of e4m3 with a scale for each row: `skinny_experts.cuh`.
#include "skinny_experts.cuh"

using namespace skinny;

EXPERTS_KERNELS(e4m3, E4m3)
