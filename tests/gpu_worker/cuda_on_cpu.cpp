// Runs the kernels of gpu_worker/ffn.cu and prefill.cu on the CPU, to check their arithmetic and addresses where there is no GPU.
//
// Every thread of a block is a fiber, and blocks run one after another. A fiber that reaches a warp collective or
// __syncthreads waits until all threads concerned have reached one; if none can go on, that is a deadlock and the
// program aborts. Covers: which lane reads, computes and writes what. Does not cover: rounding of the card's expf, erff
// and tanhf, the order of memory accesses between collectives, speed.

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads, blocks)

struct Dim3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

struct Meeting { unsigned arrived = 0, generation = 0; };
struct Fiber { ucontext_t context; std::vector<char> stack = std::vector<char>(1 << 16); bool done; };

constexpr unsigned THREADS = 256;
static Fiber fibers[THREADS];
static ucontext_t scheduler;
static Meeting block_meeting, warp_meetings[THREADS / 32];
static float exchange[THREADS];
static std::function<void()> kernel;
static bool progress;
static Dim3 threadIdx, blockIdx, gridDim;

static void meet(Meeting& meeting, unsigned size) {
    const unsigned generation = meeting.generation;
    if (++meeting.arrived == size) {
        meeting.arrived = 0;
        ++meeting.generation;
        progress = true;
    } else {
        const unsigned self = threadIdx.x;
        while (meeting.generation == generation) swapcontext(&fibers[self].context, &scheduler);
    }
}

// Every lane of the warp shows a value and reads that of lane `from`.
static float shuffle(float value, unsigned from) {
    const unsigned first = threadIdx.x / 32 * 32;
    Meeting& meeting = warp_meetings[first / 32];
    exchange[threadIdx.x] = value;
    meet(meeting, 32);
    const float other = exchange[first + from];
    meet(meeting, 32);
    return other;
}

static float __shfl_sync(unsigned, float value, int from) { return shuffle(value, from); }
static float __shfl_xor_sync(unsigned, float value, int mask) { return shuffle(value, threadIdx.x % 32 ^ mask); }
static unsigned __ballot_sync(unsigned, bool vote) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(shuffle(vote, lane) != 0) << lane;
    return votes;
}
static void __syncthreads() { meet(block_meeting, THREADS); }
static int __ffs(int bits) { return __builtin_ffs(bits); }
static float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
static float half_to_float(unsigned short bits) { _Float16 value; std::memcpy(&value, &bits, 2); return value; }

#include "ffn.cu"

static void run_thread() {
    kernel();
    fibers[threadIdx.x].done = progress = true;
}

static void launch(const unsigned* grid, std::function<void()> body) {
    kernel = std::move(body);
    gridDim = {grid[0], grid[1], grid[2]};
    for (unsigned block = 0; block < grid[0] * grid[1] * grid[2]; ++block) {
        blockIdx = {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]};
        for (Fiber& fiber : fibers) {
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = &scheduler;
            fiber.done = false;
            makecontext(&fiber.context, run_thread, 0);
        }
        do {
            progress = false;
            for (unsigned thread = 0; thread < THREADS; ++thread) {
                threadIdx.x = thread;
                if (!fibers[thread].done) swapcontext(&scheduler, &fibers[thread].context);
            }
        } while (progress);
        for (const Fiber& fiber : fibers)
            if (!fiber.done) std::fprintf(stderr, "deadlock: threads wait for one that never comes\n"), std::abort();
    }
}

extern "C" void run_gate_up(const unsigned* grid, const byte* slots, const int* ids, const unsigned* mask, int groups,
                            const float* x, int tokens, int sparse, float* h, byte* passed) {
    launch(grid, [=] { gate_up(slots, ids, mask, groups, x, tokens, sparse, h, passed); });
}
extern "C" void run_down(const unsigned* grid, const byte* slots, const int* ids, int groups, const float* h,
                         float* out) {
    launch(grid, [=] { down(slots, ids, groups, h, out); });
}
extern "C" void run_reduce(const unsigned* grid, const float* partials, int segments, int length, float* out) {
    launch(grid, [=] { reduce(partials, segments, length, out); });
}
extern "C" void run_gate_up_many(const unsigned* grid, const byte* slots, const int* ids, int groups, const float* x,
                                 int tokens, int per, float* h) {
    launch(grid, [=] { gate_up_many(slots, ids, groups, x, tokens, per, h); });
}
extern "C" void run_down_many(const unsigned* grid, const byte* slots, const int* ids, int groups, const float* h,
                              int tokens, int per, float* partials) {
    launch(grid, [=] { down_many(slots, ids, groups, h, tokens, per, partials); });
}
