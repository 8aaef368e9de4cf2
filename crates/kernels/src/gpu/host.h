// The execution model of CUDA on a CPU, for tests: a block's threads run one after the other, each as far as the next
// barrier. They are fibers, which share one stack as long as they reach no barrier.
//
// Stricter than a GPU: a barrier that not all threads of a block reach at the same line is an error. The order of the
// threads can be reversed: a kernel that lacks a barrier then gives something else.
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
    // Where it begins, and where it goes on. Jumps between the two stacks: swapcontext would ask the system for the
    // signal mask each time.
    ucontext_t start;
    jmp_buf where;
    bool started = false;
    std::vector<char> stack;
    // The thread that it runs, and the line of the barrier where that waits; 0: it has ended.
    unsigned int thread = 0;
    int waits = 0;
};

static thread_local jmp_buf scheduler;
static thread_local std::vector<Fiber *> fibers;
static thread_local Fiber *current;
static thread_local void (*body)(const void *);
static thread_local const void *body_arguments;

// Leaves the fiber for the scheduler until it is resumed: at the barrier of a line, or at its end.
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

// Runs one block; whether its threads agree on every barrier.
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

// Runs a kernel over its grid. 0, or what is wrong: 1 the size of the arguments, 2 a barrier, 3 the size of a block.
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
                // Threads that hang at a barrier are left there.
                fibers.clear();
                return 2;
            }
        }
    }
    return 0;
}

}  // namespace emulation
