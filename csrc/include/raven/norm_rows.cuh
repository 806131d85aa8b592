// Rows of channels shared out among warps, for the norms over them: what the forward and the gradients have in common.
//
// A row is one token of one tensor, all heads packed. A team of 1 to 8 warps takes a row, eight neighbouring channels a
// lane at a time. Rows of the gradients come into each lane's own shared memory by asynchronous copies.
#pragma once

#include <cstdint>

#include "memory.cuh"

namespace raven {

constexpr int kMostWarps = 16;
constexpr int kMostRowEights = 1024;         // of a row: 8,192 channels
constexpr size_t kSharedBytes = 227 * 1024;  // of a block, sm_90

// A weight [H * D], or [D] per head; null: no norm.
struct Weight {
    const void* data;
    Dtype dtype;
};

// What is known when compiled: the eights of a row that a lane holds, and the warps of a team. Full: every lane has
// that many, in q and in k, and both have one norm over the whole row.
template <int N, int Team, bool Full>
struct Shape {
    static constexpr int kEights = N;
    static constexpr int kTeam = Team;
    static constexpr bool kFull = Full;
    static constexpr int kStride = 32 * Team;  // eights between those of a lane
};

template <typename T>
constexpr int kStages = sizeof(T) == 2 ? 2 : 1;  // of copies

// Shared memory of one row in one warp.
template <typename T, typename S>
constexpr int kRowBytes = S::kEights * 32 * sizeof(Eight<T>);

__device__ inline float sum_lanes(float x, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ inline float2 sum_warp(float2 x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        x.x += __shfl_xor_sync(0xffffffffu, x.x, step);
        x.y += __shfl_xor_sync(0xffffffffu, x.y, step);
    }
    return x;
}

// Sums over the team, in the order of its warps. Two sets of cells in turn: one barrier is enough.
template <int Team>
__device__ inline float2 sum_team(float2 x, float2 (*cells)[kMostWarps], int warp, uint32_t parity) {
    x = sum_warp(x);
    if constexpr (Team > 1) {
        float2* mine = cells[parity];
        if (threadIdx.x % 32 == 0) mine[warp] = x;
        asm volatile("bar.sync %0, %1;" ::"r"(warp / Team + 1), "n"(32 * Team) : "memory");
        x = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < Team; ++i) {
            const float2 other = mine[warp / Team * Team + i];
            x.x += other.x;
            x.y += other.y;
        }
    }
    return x;
}

// A float32 copy of a weight in shared memory, the first and the second half of each eight apart: 16 neighbouring bytes
// for neighbouring lanes.
struct StagedWeight {
    Weight weight;
    int eights;
    float4* shared;

    __device__ void load(int eight, float (&x)[8]) const {
        if (weight.data != nullptr && eight < eights) load_any(weight.data, eight, weight.dtype, x);
    }
    __device__ void store(int eight, const float (&x)[8]) const {
        if (weight.data == nullptr || eight >= eights) return;
        shared[eight] = make_float4(x[0], x[1], x[2], x[3]);
        shared[eights + eight] = make_float4(x[4], x[5], x[6], x[7]);
    }
    __device__ float4* end() const { return shared + (weight.data == nullptr ? 0 : 2 * eights); }
};

// Both weights at a time: a block waits once.
__device__ inline void stage_weights(const StagedWeight& a, const StagedWeight& b) {
    for (int i = threadIdx.x; i < a.eights || i < b.eights; i += blockDim.x) {
        float x[8], y[8];
        a.load(i, x);
        b.load(i, y);
        a.store(i, x);
        b.store(i, y);
    }
}

// This lane's eights of a row, from p (its first) into shared memory; `left` counts the row's eights from there.
template <typename T, typename S>
__device__ inline void fetch_row(uint32_t shared, const T* p, int left) {
    constexpr int kParts = sizeof(T) / 2;
#pragma unroll
    for (int i = 0; i < S::kEights; ++i) {
        if (S::kFull || i * S::kStride < left) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                copy16(shared + (i * kParts + part) * 512, p + i * S::kStride * 8 + part * (8 / kParts));
            }
        }
    }
}

// An eight that was fetched; kAgain: read it again rather than keep it in registers from an earlier time.
template <typename T, bool kAgain = false>
__device__ inline Eight<T> fetched(const uint4* row, int i) {
    constexpr int kParts = sizeof(T) / 2;
    Eight<T> x;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        const uint4* p = row + (i * kParts + part) * 32;
        x.part[part] = kAgain ? read16(p) : *p;
    }
    return x;
}

// Where a lane finds the weight of its eights; null: no norm.
template <typename S>
struct WeightView {
    const float4* data;
    int half, step;  // from the first to the second half of an eight, and to the lane's next eight

    __device__ WeightView(const float4* shared, const Weight& weight, int eights, int first, int head_lanes,
                          bool per_head) {
        data = weight.data == nullptr ? nullptr : shared + (per_head ? first % head_lanes : first);
        half = per_head ? head_lanes : eights;
        step = per_head ? 0 : S::kStride;
    }

    template <bool kAgain = false>
    __device__ void read(int i, float (&w)[8]) const {
        const float4* p = data + i * (S::kFull ? S::kStride : step);
        const float4* q = p + (S::kFull ? S::kEights * S::kStride : half);
        Eight<float> x;
        x.part[0] = kAgain ? read16(p) : *reinterpret_cast<const uint4*>(p);
        x.part[1] = kAgain ? read16(q) : *reinterpret_cast<const uint4*>(q);
        unpack(x, w);
    }
};

inline size_t weight_bytes(const Weight& weight, int eights, int dim, bool per_head) {
    return weight.data == nullptr ? 0 : static_cast<size_t>(per_head ? dim / 8 : eights) * 32;
}

inline cudaError_t multiprocessors(int& count) {
    int device = 0;
    const auto status = cudaGetDevice(&device);
    return status != cudaSuccess ? status : cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

// Warps of each of `blocks` blocks, at most `most`: as many as share the rows evenly. Up to a quarter of them are given
// up where the last round would leave more than one in fifty idle.
inline int balanced_warps(int64_t rows, int64_t blocks, int team, int most) {
    const int64_t share = (rows + blocks - 1) / blocks;  // of a block
    int64_t chosen = 0, least = 0;
    for (int64_t teams = most / team; 4 * teams >= 3 * (most / team); --teams) {
        const int64_t rounds = (share + teams - 1) / teams;
        const int64_t even = (share + rounds - 1) / rounds;
        if (chosen == 0 || 50 * rounds * even < 49 * least) {
            chosen = even;
            least = rounds * even;
        }
    }
    return static_cast<int>(chosen) * team;
}

// Calls f with the shape for rows of q_eights and k_eights, at most kMost of them in a lane. Widths of common models
// fit their shape exactly; others, and norms that are not over whole rows, take one with room to spare.
template <typename T, int kMost, typename F>
cudaError_t with_shape(int q_eights, int k_eights, bool one_norm, F f) {
    constexpr bool kWide = kMost >= 6;
    const int eights = q_eights > k_eights ? q_eights : k_eights;
    if constexpr (sizeof(T) == 2) {
        if (q_eights == k_eights && one_norm) {
            switch (eights) {
                case 128:
                    return f(Shape<4, 1, true>{});
                case 192:
                    return f(Shape<kWide ? 6 : 3, kWide ? 1 : 2, true>{});
                case 256:
                    return f(Shape<4, 2, true>{});
                case 384:
                    return f(Shape<kWide ? 6 : 3, kWide ? 2 : 4, true>{});
                case 512:
                    return f(Shape<4, 4, true>{});
                case 640:
                    return f(Shape<5, 4, true>{});
                case 768:
                    return f(Shape<kWide ? 6 : 3, kWide ? 4 : 8, true>{});
            }
        }
    }
    constexpr int N = kWide && sizeof(T) == 2 ? 6 : 4;
    if (eights <= 64) return f(Shape<2, 1, false>{});
    if (eights <= 32 * N) return f(Shape<N, 1, false>{});
    if (eights <= 64 * N) return f(Shape<N, 2, false>{});
    if (eights <= 128 * N) return f(Shape<N, 4, false>{});
    if (eights <= kMostRowEights) return f(Shape<4, 8, false>{});
    return cudaErrorInvalidValue;
}

}  // namespace raven
