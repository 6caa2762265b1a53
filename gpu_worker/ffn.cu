// Feed-forward of the neurons that lie in slots of device memory, in three kernels:
//
//   gate_up  h[token][neuron] = activation(gate . x) * (up . x), or 0 if masked out or a sparse gate does not fire;
//            with dReLU relu(up . x), with swiglu_oai (up . x) + 1; without a gate activation(up . x). To a product its
//            bias is added, if it has one
//   down     partial[segment][token][column] = sum over the segment's neurons of h * down[column]
//   reduce   out[token][column] = sum over segments
//
// Every sum has a fixed order and no float is added atomically: the same call gives the same bits.
//
// Compiled for one model: launch.py gives HIDDEN, GATE_KIND, DOWN_KIND, ACTIVATION, CLOSED, LIMIT, GATED, UP_OFFSET,
// GATE_BIAS, UP_BIAS, DOWN_OFFSET, BUNDLE_BYTES, GROUP_BYTES and TAIL_OFFSET as macros, and the grids. Slots hold groups, see
// shared/model/bundle.py and shared/model/formats.py: what has no gate has its up row where the gate row is, so up is 1.
// A new weight type is a name in `Kind` and a branch of `widen`.
// No header is included: NVRTC would have to find it. The tests also compile this file as plain C++, with
// tests/gpu_worker/cuda_on_cpu.cpp in place of the CUDA built-ins.

typedef unsigned char byte;

constexpr int GROUP = 32;       // neurons of a group = lanes of a warp
constexpr int WARPS = 8;        // warps of a block
constexpr int UNIT = 8;         // weights that a lane widens at a time, two quads of neighbouring columns: a warp reads
                                // whole lines of 128 bytes or more, and x by float4
constexpr int UNITS = HIDDEN / UNIT;
constexpr int BLOCKS = HIDDEN / 32;
constexpr unsigned ALL = 0xffffffffu;

// The macros are these names: those of shared/model/formats.py, and of shared/model/architecture.py in capitals.
enum Kind { F32, F16, BF16, Q8, Q4, Q4S, Q4C };
enum Activation { SILU, RELU, GELU, GELU_TANH, RELU2, DRELU, FATRELU, SWIGLU_OAI };

// Whether a byte holds weights j and j + 16 of a block of 32.
__device__ constexpr bool nibbles(int kind) { return kind == Q4 || kind == Q4S || kind == Q4C; }

#ifdef __CUDACC__
__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#endif

__device__ __forceinline__ float half_at(const byte* from) {
    return half_to_float(*reinterpret_cast<const unsigned short*>(from));
}

// Loads WORDS words from an address of known alignment (at least 2) by the widest loads that it allows.
template <int WORDS, int ALIGN>
__device__ __forceinline__ void load(const byte* from, unsigned (&to)[WORDS]) {
    if constexpr (ALIGN >= 16 && WORDS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS / 4; ++i) {
            const uint4 four = reinterpret_cast<const uint4*>(from)[i];
            to[4 * i] = four.x;
            to[4 * i + 1] = four.y;
            to[4 * i + 2] = four.z;
            to[4 * i + 3] = four.w;
        }
    } else if constexpr (ALIGN >= 8 && WORDS % 2 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS / 2; ++i) {
            const uint2 two = reinterpret_cast<const uint2*>(from)[i];
            to[2 * i] = two.x;
            to[2 * i + 1] = two.y;
        }
    } else if constexpr (ALIGN >= 4) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) to[i] = reinterpret_cast<const unsigned*>(from)[i];
    } else {
        const unsigned short* halves = reinterpret_cast<const unsigned short*>(from);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) to[i] = halves[2 * i] | static_cast<unsigned>(halves[2 * i + 1]) << 16;
    }
}

// The alignment of a unit: rows start at OFFSET in bundles of 64-byte alignment, units are BYTES apart.
__device__ constexpr int alignment(int offset, int bytes) {
    const int common = offset | bytes | 64;
    return common & -common;
}

// First column of a unit's quad 0 or 1: of nibbles, the low halves of four bytes are one quad, the high ones the other.
template <int KIND>
__device__ __forceinline__ int column(int unit, int quad) {
    return nibbles(KIND) ? unit / 4 * 32 + quad * 16 + unit % 4 * 4 : unit * UNIT + quad * 4;
}

// Widens one unit of the row at OFFSET of a bundle to what `unpack` of shared/model/formats.py gives, but for one
// rounding in place of two where a minimum is added.
template <int KIND, int OFFSET>
__device__ __forceinline__ void widen(const byte* bundle, int unit, float (&to)[UNIT]) {
    const byte* row = bundle + OFFSET;
    if constexpr (KIND == F32) {
        unsigned words[8];
        load<8, alignment(OFFSET, 32)>(row + 32 * unit, words);
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = __uint_as_float(words[i]);
    } else if constexpr (KIND == F16 || KIND == BF16) {
        unsigned words[4];
        load<4, alignment(OFFSET, 16)>(row + 16 * unit, words);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const unsigned short low = words[i] & 0xffffu, high = words[i] >> 16;
            to[2 * i] = KIND == F16 ? half_to_float(low) : __uint_as_float(words[i] << 16);
            to[2 * i + 1] = KIND == F16 ? half_to_float(high) : __uint_as_float(words[i] & 0xffff0000u);
        }
    } else if constexpr (KIND == Q8) {
        unsigned words[2];
        load<2, alignment(OFFSET, 8)>(row + 8 * unit, words);
        const float scale = half_at(row + HIDDEN + 2 * (unit / 4));
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = scale * static_cast<signed char>(words[i / 4] >> i % 4 * 8);
    } else {
        static_assert(KIND == Q4 || KIND == Q4S || KIND == Q4C, "a weight type without a branch here");
        unsigned words[1];
        load<1, alignment(OFFSET, 4)>(row + 4 * unit, words);
        float scale = 1, minimum = 0;  // Q4C: the bare numbers; the scales are the columns', see `column_scale`
        if constexpr (KIND != Q4C) {
            const byte* scales = row + HIDDEN / 2 + 2 * (unit / 4);
            scale = half_at(scales);
            minimum = KIND == Q4 ? half_at(scales + 2 * BLOCKS) : -8 * scale;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            to[i] = fmaf(static_cast<float>(words[0] >> 8 * i & 15u), scale, minimum);
            to[4 + i] = fmaf(static_cast<float>(words[0] >> (8 * i + 4) & 15u), scale, minimum);
        }
    }
}

// Of Q4C: scale and minimum of weight i of a unit, which the 32 down rows of a group share.
__device__ __forceinline__ float2 column_scale(const byte* group, int unit, int i) {
    const byte* scale = group + TAIL_OFFSET + 2 * (column<Q4C>(unit, i / 4) + i % 4);
    return {half_at(scale), half_at(scale + 2 * HIDDEN)};
}

// Dot product of a row with x by a whole warp; every lane returns the sum. float32 all the way, in an order that HIDDEN
// alone decides.
template <int KIND, int OFFSET>
__device__ __forceinline__ float dot(const byte* bundle, const float* x, int lane) {
    float sum = 0;
#pragma unroll 4
    for (int unit = lane; unit < UNITS; unit += 32) {
        float weights[UNIT];
        widen<KIND, OFFSET>(bundle, unit, weights);
#pragma unroll
        for (int quad = 0; quad < 2; ++quad) {
            const float4 four = *reinterpret_cast<const float4*>(x + column<KIND>(unit, quad));
            sum = fmaf(weights[4 * quad], four.x, sum);
            sum = fmaf(weights[4 * quad + 1], four.y, sum);
            sum = fmaf(weights[4 * quad + 2], four.z, sum);
            sum = fmaf(weights[4 * quad + 3], four.w, sum);
        }
    }
#pragma unroll
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(ALL, sum, distance);
    return sum;
}

// Whether a neuron with this gate may contribute, and with this up, as in shared/kernels/activation.py: a NaN does, to
// be seen in the output.
__device__ __forceinline__ bool fires(float gate) { return !(gate <= CLOSED); }
__device__ __forceinline__ bool up_fires(float up) { return ACTIVATION != DRELU || !(up <= 0); }

__device__ __forceinline__ float activate(float gate) {
    if (!fires(gate)) return 0;
    if constexpr (ACTIVATION == SILU) return gate / (1 + expf(-gate));
    if constexpr (ACTIVATION == GELU) return 0.5f * gate * (1 + erff(gate * 0.70710678118654752f));
    if constexpr (ACTIVATION == GELU_TANH)
        return 0.5f * gate * (1 + tanhf(0.79788456080286536f * (gate + 0.044715f * gate * gate * gate)));
    return ACTIVATION == RELU2 ? gate * gate : gate;
}

// What a neuron's down row is multiplied with.
__device__ __forceinline__ float factor(float gate, float up) {
    if constexpr (ACTIVATION == SWIGLU_OAI) {
        // Comparisons that a NaN fails, so that it stays.
        if (gate > LIMIT) gate = LIMIT;
        if (up > LIMIT) up = LIMIT;
        if (up < -LIMIT) up = -LIMIT;
        return gate / (1 + expf(-1.702f * gate)) * (up + 1);
    }
    return activate(gate) * (up_fires(up) ? up : 0);
}

// The bias at OFFSET of a bundle; 0: there is none.
template <int OFFSET>
__device__ __forceinline__ float bias(const byte* bundle) {
    return OFFSET ? *reinterpret_cast<const float*>(bundle + OFFSET) : 0;
}

// One warp per neuron and token; the tokens of a neuron are neighbours and share its weights in the cache.
// slots [slot][GROUP_BYTES], ids [groups], mask [groups], x [tokens][HIDDEN], h [tokens][groups * 32].
// When sparse, passed [groups * 32][tokens] tells which were computed: a byte each, so that no warp waits for another.
extern "C" __global__ void gate_up(const byte* __restrict__ slots, const int* __restrict__ ids,
                                   const unsigned* __restrict__ mask, int groups, const float* __restrict__ x,
                                   int tokens, int sparse, float* __restrict__ h, byte* __restrict__ passed) {
    const int lane = threadIdx.x % 32;
    const int job = static_cast<int>(blockIdx.x) * WARPS + static_cast<int>(threadIdx.x) / 32;
    if (job >= groups * GROUP * tokens) return;
    const int neuron = job / tokens, token = job % tokens;
    const byte* group = slots + static_cast<long long>(ids[neuron / GROUP]) * GROUP_BYTES;
    const byte* bundle = group + neuron % GROUP * BUNDLE_BYTES;
    const float* input = x + static_cast<long long>(token) * HIDDEN;
    float value = 0;
    bool whole = false;
    if (mask[neuron / GROUP] >> neuron % GROUP & 1) {
        const float gate = dot<GATE_KIND, 0>(bundle, input, lane) + bias<GATE_BIAS>(bundle);
        if (!sparse || fires(gate)) {
            float up = 1;
            if constexpr (GATED) up = dot<GATE_KIND, UP_OFFSET>(bundle, input, lane) + bias<UP_BIAS>(bundle);
            value = factor(gate, up);
            whole = up_fires(up);
        }
    }
    if (lane == 0) {
        h[static_cast<long long>(token) * groups * GROUP + neuron] = value;
        if (sparse) passed[job] = whole;
    }
}

// Block (tile, segment, token) sums 32 units of columns over groups segment * WARPS + warp, + segments * WARPS, ...
// A warp reads the h of a group at once, a lane each, then visits the neurons that are not zero, in order: where few
// neurons fire, their down rows alone are read.
extern "C" __global__ void down(const byte* __restrict__ slots, const int* __restrict__ ids, int groups,
                                const float* __restrict__ h, float* __restrict__ partials) {
    __shared__ float sums[WARPS][UNIT][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int unit = static_cast<int>(blockIdx.x) * 32 + lane;
    float sum[UNIT] = {};
    for (int g = static_cast<int>(blockIdx.y) * WARPS + warp; g < groups; g += static_cast<int>(gridDim.y) * WARPS) {
        const float mine = h[(static_cast<long long>(blockIdx.z) * groups + g) * GROUP + lane];
        const byte* group = slots + static_cast<long long>(ids[g]) * GROUP_BYTES;
        unsigned left = __ballot_sync(ALL, mine != 0);
        float numbers[UNIT] = {}, factors = 0;
        while (left) {
            const int neuron = __ffs(static_cast<int>(left)) - 1;
            left &= left - 1;
            const float factor = __shfl_sync(ALL, mine, neuron);
            if (unit < UNITS) {
                float weights[UNIT];
                widen<DOWN_KIND, DOWN_OFFSET>(group + neuron * BUNDLE_BYTES, unit, weights);
#pragma unroll
                for (int i = 0; i < UNIT; ++i) {
                    float& target = DOWN_KIND == Q4C ? numbers[i] : sum[i];
                    target = fmaf(factor, weights[i], target);
                }
                factors += factor;
            }
        }
        if constexpr (DOWN_KIND == Q4C) {
            if (unit < UNITS) {
#pragma unroll
                for (int i = 0; i < UNIT; ++i) {
                    const float2 scale = column_scale(group, unit, i);
                    sum[i] = fmaf(scale.x, numbers[i], fmaf(scale.y, factors, sum[i]));
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < UNIT; ++i) sums[warp][i][lane] = sum[i];
    __syncthreads();
    if (unit >= UNITS) return;
    // Warp i now adds up weight i of every lane's unit: UNIT = WARPS.
    float total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) total += sums[i][warp][lane];
    const long long row = static_cast<long long>(blockIdx.y) * gridDim.z + blockIdx.z;
    partials[row * HIDDEN + column<DOWN_KIND>(unit, warp / 4) + warp % 4] = total;
}

// partials [segments][length], out [length].
extern "C" __global__ void reduce(const float* __restrict__ partials, int segments, int length,
                                  float* __restrict__ out) {
    const int i = static_cast<int>(blockIdx.x) * (WARPS * 32) + static_cast<int>(threadIdx.x);
    if (i >= length) return;
    float total = 0;
    for (int s = 0; s < segments; ++s) total += partials[static_cast<long long>(s) * length + i];
    out[i] = total;
}
