// Fibers: a stack each, and a switch between them that saves what a call must keep. swapcontext asks the kernel for
// the signal mask at each switch, which would be most of a run; elsewhere than on x86-64 it still serves.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#if !defined(__x86_64__) && !defined(PA_HOST_UCONTEXT)
#define PA_HOST_UCONTEXT
#endif
#if defined(PA_HOST_UCONTEXT)
#include <ucontext.h>
#endif

namespace prefixattn::host {

#if defined(PA_HOST_UCONTEXT)

struct Fiber {
    ucontext_t context;
};
inline void switch_fiber(Fiber &from, Fiber &to) { swapcontext(&from.context, &to.context); }
// `entry` never returns.
inline void start_fiber(Fiber &fiber, char *stack, size_t bytes, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}

#else

struct Fiber {
    void *top;  // of its stack, where it was left
};
// rdi: where the top of this stack goes; rsi: that of the other. The registers saved are those that a call keeps, and
// callers may not learn that the others are left alone here: the other fiber changes them.
#if defined(__clang__)
__attribute__((naked, noinline))
#else
__attribute__((naked, noinline, noipa))
#endif
inline void switch_stack(void ** /*from*/, void * /*to*/) {
    __asm__ volatile(
        "pushq %rbp\n\t"
        "pushq %rbx\n\t"
        "pushq %r12\n\t"
        "pushq %r13\n\t"
        "pushq %r14\n\t"
        "pushq %r15\n\t"
        "movq %rsp, (%rdi)\n\t"
        "movq %rsi, %rsp\n\t"
        "popq %r15\n\t"
        "popq %r14\n\t"
        "popq %r13\n\t"
        "popq %r12\n\t"
        "popq %rbx\n\t"
        "popq %rbp\n\t"
        "popq %rcx\n\t"
        "jmpq *%rcx");
}
inline void switch_fiber(Fiber &from, Fiber &to) { switch_stack(&from.top, to.top); }
// `entry` never returns.
inline void start_fiber(Fiber &fiber, char *stack, size_t bytes, void (*entry)()) {
    void **top = reinterpret_cast<void **>(((uintptr_t)stack + bytes) & ~(uintptr_t)63);
    *--top = nullptr;  // where `entry` would return to; a call leaves the stack 8 bytes off a multiple of 16
    *--top = reinterpret_cast<void *>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.top = top;
}

#endif

// Stacks that are made once and used by every block, a page that nobody may touch below each.
class Stacks {
  public:
    static constexpr size_t kBytes = 256 * 1024;
    ~Stacks() {
        for (char *stack : stacks_) munmap(stack, kBytes);
    }
    // False: the system has no memory left.
    bool reserve(size_t count) {
        while (stacks_.size() < count) {
            void *made =
                mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (made == MAP_FAILED) return false;
            mprotect(made, (size_t)sysconf(_SC_PAGESIZE), PROT_NONE);
            stacks_.push_back(static_cast<char *>(made));
        }
        return true;
    }
    char *operator[](size_t i) const { return stacks_[i]; }
    // Stacks that end at the same place of a page would share a few lines of the cache.
    static size_t bytes(size_t i) { return kBytes - i * 7 % 32 * 128; }

  private:
    std::vector<char *> stacks_;
};

}  // namespace prefixattn::host
