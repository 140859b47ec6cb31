// Products of few tokens with weights of e4m3 with a scale for each row: `skinny_linear.cuh`.
#include "skinny_linear.cuh"

using namespace skinny;

SKINNY_KERNELS(e4m3, E4m3)
