// Several tokens at once: the feed-forward as two matrix products; appended to ffn.cu, whose names it uses.
//
//   gate_up_many  h[neuron][token] = factor(gate . x, up . x)             block: the 32 neurons of a group x its tokens
//   down_many     partial[segment][column][token] = sum of h * down       block: 64 columns x its tokens, then `reduce`
//
// x, h, partials and the output are in panels of 16 tokens, as on the board: [panel][hidden or neuron][16].
//
// A step of either takes 32 terms of the sums: a tile of weights, widened to float32 once for all tokens, and a tile of
// inputs go to shared memory; a thread then adds 8 weights x PER tokens of its own in registers. Every sum is made by
// one thread in order, so a token's h does not depend on the tokens beside it.
//
// What limits it on an H100 (67 TFLOP/s in float32, 3.35 TB/s; by arithmetic, not measured): a layer of hidden 4096,
// 11008 neurons and 288 tokens takes 6 * 4096 * 11008 * 288 = 78 GFLOP, 1.2 ms at the least, and reads 270 MB of
// float16 weights once for every 96 tokens, mostly from the L2, 0.25 ms. So arithmetic: an inner step has 8 * PER
// multiplications for 2 broadcast loads of 16 bytes and PER of 4, which shared memory serves in less time. One dot
// product per neuron and token, as for single tokens, loads 24 KB for 8 KFLOP and is bound by the L1, ten times slower.
// Tensor cores are left out: they would round the inputs, and what float32 models promise is float32.

constexpr int STEP = 32;       // terms of a sum that are in shared memory at a time
constexpr int MAX_PER = 4;    // tokens of a thread at most
constexpr int WIDE = 64 + 8;   // weights of a term, padded: the units of a row are stored without bank conflicts
constexpr int TOKENS = 32 * MAX_PER + 4;  // inputs of a term, padded likewise
constexpr int LANES = 16;      // tokens of a panel

struct Tiles {
    float4 weights[STEP][WIDE / 4];
    float4 inputs[STEP][TOKENS / 4];
};

// Row of a column, of 32, in a tile of gates: weight i of unit u at 4 i + u.
template <int KIND>
__device__ __forceinline__ int row_of(int column) {
    return nibbles(KIND) ? (column / 16 * 4 + column % 4) * 4 + column % 16 / 4 : column % UNIT * 4 + column / UNIT;
}

// 32 rows of panels that have `rows`, each thread's row into row `to` of the tile; 0 behind the last panel, which ends
// before token `ends`.
template <int PER>
__device__ __forceinline__ void take_inputs(Tiles& tiles, const float* from, long long rows, int first, int ends,
                                            int to) {
    const int row = threadIdx.x % 128 / 4, quad = threadIdx.x % 4;
#pragma unroll
    for (int p = 0; p < PER; ++p) {
        const int panel = 2 * p + threadIdx.x / 128, token = first + LANES * panel + 4 * quad;
        float4 four = {};
        if (token < ends)
            four = reinterpret_cast<const float4*>(from + (first / LANES + panel) * rows * LANES)[4 * row + quad];
        tiles.inputs[to][4 * panel + quad] = four;
    }
}

// Where a token's value of `row` lies in panels that have `rows`.
__device__ __forceinline__ long long place(int token, long long rows, int row) {
    return (token / LANES * rows + row) * LANES + token % LANES;
}

// Adds the products of the tiles: the warp's weights 4 w to 4 w + 3 and, of 8, 32 more, each lane's tokens lane + 32 p.
template <int PER, int WEIGHTS>
__device__ __forceinline__ void multiply(const Tiles& tiles, float (&sums)[WEIGHTS][PER]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 4
    for (int k = 0; k < STEP; ++k) {
        float weights[WEIGHTS];
#pragma unroll
        for (int i = 0; i < WEIGHTS / 4; ++i) {
            const float4 four = tiles.weights[k][WARPS * i + warp];
            weights[4 * i] = four.x;
            weights[4 * i + 1] = four.y;
            weights[4 * i + 2] = four.z;
            weights[4 * i + 3] = four.w;
        }
#pragma unroll
        for (int p = 0; p < PER; ++p) {
            const float input = reinterpret_cast<const float*>(tiles.inputs[k])[lane + 32 * p];
#pragma unroll
            for (int i = 0; i < WEIGHTS; ++i) sums[i][p] = fmaf(weights[i], input, sums[i][p]);
        }
    }
}

template <int PER>
__device__ __forceinline__ void gate_up_tile(Tiles& tiles, const byte* group, int groups, const float* x, int tokens,
                                             float* h) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = static_cast<int>(blockIdx.y) * 32 * PER;
    const int neurons = groups * GROUP, ends = (tokens + LANES - 1) / LANES * LANES;
    // A unit of a row for every thread: gates in the first half of the block, ups, if there are any, in the second.
    const int row = threadIdx.x / 4, unit = threadIdx.x % 4;
    const byte* bundle = group + row % GROUP * BUNDLE_BYTES;
    float sums[GATED ? 8 : 4][PER] = {};
    for (int block = 0; block < BLOCKS; ++block) {
        float weights[UNIT];
        if (row < GROUP)
            widen<GATE_KIND, 0>(bundle, 4 * block + unit, weights);
        else if constexpr (GATED)
            widen<GATE_KIND, UP_OFFSET>(bundle, 4 * block + unit, weights);
        __syncthreads();  // all are done with the tiles before
        if (GATED || row < GROUP) {
#pragma unroll
            for (int i = 0; i < UNIT; ++i) reinterpret_cast<float*>(tiles.weights[4 * i + unit])[row] = weights[i];
        }
        take_inputs<PER>(tiles, x + 32 * block * LANES, HIDDEN, first, ends, row_of<GATE_KIND>(threadIdx.x % 128 / 4));
        __syncthreads();
        multiply(tiles, sums);
    }
#pragma unroll
    for (int p = 0; p < PER; ++p) {
        const int token = first + 32 * p + lane;
        if (token >= ends) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int neuron = 4 * warp + i;
            const byte* own = group + neuron * BUNDLE_BYTES;
            float up = 1;
            if constexpr (GATED) up = sums[4 + i][p] + bias<UP_BIAS>(own);
            h[place(token, neurons, static_cast<int>(blockIdx.x) * GROUP + neuron)] =
                factor(sums[i][p] + bias<GATE_BIAS>(own), up);
        }
    }
}

template <int PER>
__device__ __forceinline__ void down_tile(Tiles& tiles, const byte* slots, const int* ids, int groups, const float* h,
                                          int tokens, float* partials) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = static_cast<int>(blockIdx.z) * 32 * PER;
    const int neurons = groups * GROUP, ends = (tokens + LANES - 1) / LANES * LANES;
    // A unit of a neuron for every thread.
    const int neuron = threadIdx.x / 8, unit = static_cast<int>(blockIdx.x) * 8 + threadIdx.x % 8;
    const int left = static_cast<int>(blockIdx.x) * 64;
    float sums[8][PER] = {};
    for (int g = static_cast<int>(blockIdx.y); g < groups; g += static_cast<int>(gridDim.y)) {
        const byte* group = slots + static_cast<long long>(ids[g]) * GROUP_BYTES;
        float weights[UNIT] = {};
        if (unit < UNITS) {
            widen<DOWN_KIND, DOWN_OFFSET>(group + neuron * BUNDLE_BYTES, unit, weights);
            if constexpr (DOWN_KIND == Q4C) {
#pragma unroll
                for (int i = 0; i < UNIT; ++i) {
                    const float2 scale = column_scale(group, unit, i);
                    weights[i] = fmaf(scale.x, weights[i], scale.y);
                }
            }
        }
        __syncthreads();  // all are done with the tiles before
#pragma unroll
        for (int quad = 0; quad < 2; ++quad) {
            const float* four = weights + 4 * quad;
            float4& to = tiles.weights[neuron][(column<DOWN_KIND>(unit, quad) - left) / 4];
            to.x = four[0];
            to.y = four[1];
            to.z = four[2];
            to.w = four[3];
        }
        const float* from = h + static_cast<long long>(g) * GROUP * LANES;
        take_inputs<PER>(tiles, from, neurons, first, ends, threadIdx.x % 128 / 4);
        __syncthreads();
        multiply(tiles, sums);
    }
    float* out = partials + static_cast<long long>(blockIdx.y) * ends * HIDDEN;
#pragma unroll
    for (int p = 0; p < PER; ++p) {
        const int token = first + 32 * p + lane;
        if (token >= ends) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int to = left + i / 4 * 32 + 4 * warp + i % 4;
            if (to < HIDDEN) out[place(token, HIDDEN, to)] = sums[i][p];
        }
    }
}

// Grid: groups, tiles of 32 * `per` tokens.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 3)
gate_up_many(const byte* __restrict__ slots, const int* __restrict__ ids, int groups, const float* __restrict__ x,
             int tokens, int per, float* __restrict__ h) {
    __shared__ Tiles tiles;
    const byte* group = slots + static_cast<long long>(ids[blockIdx.x]) * GROUP_BYTES;
    if (per == 1) gate_up_tile<1>(tiles, group, groups, x, tokens, h);
    if (per == 2) gate_up_tile<2>(tiles, group, groups, x, tokens, h);
    if (per == 3) gate_up_tile<3>(tiles, group, groups, x, tokens, h);
    if (per == 4) gate_up_tile<4>(tiles, group, groups, x, tokens, h);
}

// Grid: tiles of 64 columns, segments, tiles of 32 * `per` tokens. Segment s takes groups s, s + segments, ...
extern "C" __global__ void __launch_bounds__(32 * WARPS, 3)
down_many(const byte* __restrict__ slots, const int* __restrict__ ids, int groups, const float* __restrict__ h,
          int tokens, int per, float* __restrict__ partials) {
    __shared__ Tiles tiles;
    if (per == 1) down_tile<1>(tiles, slots, ids, groups, h, tokens, partials);
    if (per == 2) down_tile<2>(tiles, slots, ids, groups, h, tokens, partials);
    if (per == 3) down_tile<3>(tiles, slots, ids, groups, h, tokens, partials);
    if (per == 4) down_tile<4>(tiles, slots, ids, groups, h, tokens, partials);
}
