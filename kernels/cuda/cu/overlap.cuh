// Launches that overlap: how a kernel lets the next one begin, and waits for those before it
// (programmatic dependent launch, PTX ISA, griddepcontrol).
#pragma once

#include "target.cuh"

// From here on a dependent launch behind this one may begin, as soon as every block has come here
// and where there is room: first of all, since its blocks wait and take nobody's turn.
DEVICE void launch_dependents() {
#if !defined(LOCKSTEP_EMULATE) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the launches before are done, and sees what they wrote. Until then a kernel writes
// nothing to global memory, and reads only what no launch writes since a launch that was not a
// dependent one: weights, what lays out the step, the cache of earlier steps. Every block of a
// dependent launch comes here before it ends: else the launch could be done before those before
// it, and whoever waits for this one would not wait for them.
DEVICE void wait_prerequisites() {
#ifdef LOCKSTEP_EMULATE
    simt::wait_prerequisites();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Where nothing can be done ahead.
DEVICE void follow_launches() {
    launch_dependents();
    wait_prerequisites();
}
