// The host bodies of `hopper.cuh`.
//
// Products run when they are waited for, not when they are begun: until then their accumulators
// are NaNs, and what they read (shared memory, and registers given as A) is what lies there at the
// wait. So a missing wait, and an operand that changes too early, show in the result. Each warp
// does its sixteen rows when it waits itself, whatever the other three are at; what the four begin
// must agree. Descriptors are decoded bit by bit: reserved bits, other swizzles than the 128-byte
// one, a pattern that does not start at a multiple of 1024 and addresses outside shared memory are
// errors. So are products without a wgmma.fence after the last wait, and operands that a cp.async
// or store16_operand wrote with no proxy fence after it, by the writer or by the warp that reads.
//
// A cp.async behind mbarrier_arrive_copies lands when somebody waits for the barrier (threads in
// turn), at once (backwards) or either (at random). So does a bulk copy; one that begins before its
// bytes are expected is an error, and bytes that are expected and never come hold the phase up.
//
// Registers are counted: warps start with what the kernel's threads share of 65536, and who asks
// setmaxnreg for more than others gave back waits for ever.
//
// Not seen: other stores that a proxy fence should follow, registers that were changed after
// the wgmma.fence, more registers used than setmaxnreg left, the order in which a tensor core adds.
#pragma once

#include <cstdint>

namespace simt {

// One wgmma m64nNk16 of bf16 as a thread begins it: N = 2 · registers.
struct Wgmma {
    float* d;
    int registers;
    // Of four registers; null where A is in shared memory.
    const uint32_t* a;
    uint64_t a_descriptor, b_descriptor;
    bool b_transposed, accumulate;
};

void wgmma(Wgmma mine);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
void fence_async_proxy();
// The running thread has stored a part of an operand.
void note_operand(const void* to, unsigned bytes);
// A warp has `count` registers a lane from here on.
void setmaxnreg(unsigned count, bool grow);

// Shared memory addresses as a descriptor holds them.
uint32_t shared_address(const void* p);

void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_arrive_copies(uint64_t* barrier);
// An arrival that makes the phase wait for `bytes` more of bulk copies, which begin after it.
void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes);
// Global to shared memory, of multiples of 16 bytes.
void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);

}  // namespace simt
