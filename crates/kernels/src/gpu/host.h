// CUDA's execution model on a CPU, for tests. The threads of a block run one after the other, each
// up to the next barrier. They are fibers, which share one stack as long as they reach no barrier.
//
// The emulation is stricter than a GPU: it is an error if not all threads of a block reach a
// barrier at the same line. The order of the threads can be reversed, and a kernel that lacks a
// barrier then gives other results.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <vector>

#define __device__
#define __host__
#define __restrict__ __restrict
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __syncthreads() emulation::leave(__LINE__)

struct Dimensions {
    unsigned int x, y, z;
};
static thread_local Dimensions threadIdx, blockIdx, blockDim, gridDim;

static inline float __uint_as_float(unsigned int bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline unsigned int __float_as_uint(float x) {
    unsigned int bits;
    memcpy(&bits, &x, 4);
    return bits;
}

namespace emulation {

struct Fiber {
    // The context where the fiber starts, and the place where it resumes. Fibers switch stacks with
    // _longjmp, because swapcontext makes a system call for the signal mask each time.
    ucontext_t start;
    jmp_buf where;
    bool started = false;
    std::vector<char> stack;
    // The thread that the fiber runs, and the line of the barrier where it waits, or 0 if it has
    // ended.
    unsigned int thread = 0;
    int waits = 0;
};

static thread_local jmp_buf scheduler;
static thread_local std::vector<Fiber *> fibers;
static thread_local Fiber *current;
static thread_local void (*body)(const void *);
static thread_local const void *body_arguments;

// Leaves the fiber for the scheduler, at the barrier of a line or (line 0) at its end, until the
// fiber is resumed.
static inline void leave(int line) {
    Fiber *self = current;
    self->waits = line;
    if (_setjmp(self->where) == 0) _longjmp(scheduler, 1);
}

static inline void entry() {
    for (;;) {
        body(body_arguments);
        leave(0);
    }
}

static inline Fiber *fiber(size_t i) {
    if (i == fibers.size()) {
        Fiber *made = new Fiber;
        made->stack.resize(256 * 1024);
        getcontext(&made->start);
        made->start.uc_stack.ss_sp = made->stack.data();
        made->start.uc_stack.ss_size = made->stack.size();
        made->start.uc_link = nullptr;
        makecontext(&made->start, entry, 0);
        fibers.push_back(made);
    }
    return fibers[i];
}

static inline void resume(Fiber *fiber) {
    current = fiber;
    threadIdx = {fiber->thread % blockDim.x, fiber->thread / blockDim.x, 0};
    if (_setjmp(scheduler) != 0) return;
    if (fiber->started) _longjmp(fiber->where, 1);
    fiber->started = true;
    setcontext(&fiber->start);
}

// Runs one block. Returns whether its threads agree on every barrier.
static inline bool block(bool reverse) {
    unsigned int count = blockDim.x * blockDim.y;
    size_t waiting = 0;
    for (unsigned int i = 0; i < count; i++) {
        Fiber *next = fiber(waiting);
        next->thread = reverse ? count - 1 - i : i;
        resume(next);
        waiting += next->waits != 0;
    }
    while (waiting > 0) {
        if (waiting != count) return false;
        int line = fibers[0]->waits;
        for (size_t i = 0; i < count; i++) {
            if (fibers[i]->waits != line) return false;
        }
        waiting = 0;
        for (size_t i = 0; i < count; i++) {
            resume(fibers[i]);
            waiting += fibers[i]->waits != 0;
        }
    }
    return true;
}

// Runs a kernel over its grid. Returns 0, or an error: 1 for the size of the arguments, 2 for a
// barrier, 3 for the size of a block.
template <typename A>
static int run(const A &arguments, size_t size, void (*kernel)(const A &), const unsigned int *launch, int reverse) {
    static thread_local void (*function)(const A &);
    if (size != sizeof(A)) return 1;
    function = kernel;
    body = [](const void *arguments) { function(*(const A *)arguments); };
    body_arguments = &arguments;
    gridDim = {launch[0], launch[1], 1};
    blockDim = {launch[2], launch[3], 1};
    if (blockDim.x * blockDim.y == 0 || blockDim.x * blockDim.y > 256) return 3;
    for (unsigned int y = 0; y < gridDim.y; y++) {
        for (unsigned int x = 0; x < gridDim.x; x++) {
            blockIdx = {x, y, 0};
            if (!block(reverse)) {
                // The fibers that wait at the barrier cannot be resumed, so they are leaked.
                fibers.clear();
                return 2;
            }
        }
    }
    return 0;
}

}  // namespace emulation
