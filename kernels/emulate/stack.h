// A stack of its own for each fiber, and the switch from one to another.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

class Stack {
public:
    // Who switches here next starts `entry`, which never returns, on memory of the stack's own.
    void prepare(void (*entry)());

    // Leaves off here, on `from`, and goes on where `to` left off. In line and without a call:
    // fibers leave off at the same places of a kernel, so that the returns which follow are those
    // that the processor expects. The C library's way asks the system about signals each time.
    static inline void change(Stack& from, Stack& to) {
#if defined(__x86_64__)
        void** left = &from.at;
        void** entered = &to.at;
        // Below the stack pointer there may be 128 bytes in use.
        asm volatile(
            "leaq -128(%%rsp), %%rsp\n"
            "pushq %%rbp\n"
            "pushq %%rbx\n"
            "leaq 1f(%%rip), %%rax\n"
            "pushq %%rax\n"
            "movq %%rsp, (%0)\n"
            "movq (%1), %%rsp\n"
            "popq %%rax\n"
            "jmp *%%rax\n"
            "1:\n"
            "popq %%rbx\n"
            "popq %%rbp\n"
            "leaq 128(%%rsp), %%rsp\n"
            : "+D"(left), "+S"(entered)
            :
            : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0",
              "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
              "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");
#else
        swapcontext(&from.at, &to.at);
#endif
    }

private:
    static constexpr size_t BYTES = 64 << 10;

    std::unique_ptr<char[]> memory;
#if defined(__x86_64__)
    void* at = nullptr;
#else
    ucontext_t at;
#endif
};

}  // namespace simt
