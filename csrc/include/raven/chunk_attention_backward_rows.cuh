// What surrounds the backward of chunk_attention, at memory speed: statistics of query rows and an empty accumulator
// before it, the accumulator to a gradient behind it. A block handles one query tile of one head.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "tensor_map.h"

namespace raven {

struct BackwardRows {
    const int2* tiles;  // first query, queries
    int tile_count, heads;
    int64_t batch, length;
    const void *out, *grad;       // [B, L, H, D], out contiguous
    const float *lse, *grad_lse;  // [B, H, L]; grad_lse may be null
    Strides grad_strides;
    float* rows;             // [B, H, tiles, 2, QUERIES]
    float* accumulator;      // [B, H, tiles, D * QUERIES]
    int *next_item, *turns;  // turns may be null
    void* dq;                // [B, L, H, D]
    float scale;
};

template <typename T>
__device__ __forceinline__ float2 widen(uint32_t word) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000));
    } else {
        return __half22float2(*reinterpret_cast<const __half2*>(&word));
    }
}

// Which tile of which head a block has: heads fastest, so that neighbours read neighbouring memory.
struct RowBlock {
    int head, tile, sample;
    int64_t at;  // in [B, H, tiles]
    __device__ __forceinline__ explicit RowBlock(const BackwardRows& a) {
        const unsigned index = blockIdx.x;
        head = index % a.heads;
        tile = index / a.heads % a.tile_count;
        sample = index / a.heads / a.tile_count;
        at = (int64_t(sample) * a.heads + head) * a.tile_count + tile;
    }
};

template <typename T, int D, int QUERIES>
__global__ void __launch_bounds__(256) backward_prepare_kernel(const BackwardRows a) {
    const RowBlock block(a);
    const int2 tile = a.tiles[block.tile];
    float4* accumulator = reinterpret_cast<float4*>(a.accumulator + block.at * (D * QUERIES));
#pragma unroll
    for (int i = 0; i < D * QUERIES / 4 / 256; ++i)
        accumulator[i * 256 + threadIdx.x] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.next_item = 0;
    if (a.turns != nullptr && threadIdx.x < 2) a.turns[2 * block.at + threadIdx.x] = 0;

    constexpr int LANES = D / 8, PASS = 256 / LANES;
    const int lane = threadIdx.x % LANES;
    float* rows = a.rows + block.at * (2 * QUERIES);
#pragma unroll
    for (int first = 0; first < QUERIES; first += PASS) {
        const int row = first + threadIdx.x / LANES;
        const bool present = row < tile.y && row < QUERIES;
        const int64_t token = tile.x + row;
        float sum = 0.f;
        if (present) {
            const int64_t out_at = ((block.sample * a.length + token) * a.heads + block.head) * D + lane * 8;
            const int64_t grad_at = block.sample * a.grad_strides.batch + token * a.grad_strides.token +
                                    block.head * a.grad_strides.head + lane * 8;
            const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const T*>(a.out) + out_at);
            const uint4 y = *reinterpret_cast<const uint4*>(static_cast<const T*>(a.grad) + grad_at);
            const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 u = widen<T>(xs[i]), w = widen<T>(ys[i]);
                sum += u.x * w.x + u.y * w.y;
            }
        }
#pragma unroll
        for (int bit = LANES / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, bit);
        if (lane == 0 && row < QUERIES) {
            float lse = INFINITY;  // a weight of exactly 0, for absent queries and those without keys
            if (present) {
                const int64_t at = (int64_t(block.sample) * a.heads + block.head) * a.length + token;
                if (a.grad_lse != nullptr) sum -= a.grad_lse[at];
                lse = a.lse[at];
                lse = lse == -INFINITY ? INFINITY : lse * 1.4426950408889634f;
            }
            rows[row] = lse;
            rows[QUERIES + row] = sum;
        }
    }
}

// The accumulator holds dQ^T as the products left it in registers: [part, column / 8, thread, 4].
template <typename T, int D, int QUERIES>
__global__ void __launch_bounds__(256) backward_finish_kernel(const BackwardRows a) {
    constexpr int COLUMNS = D == 128 ? QUERIES : QUERIES / 2, WORDS = COLUMNS / 8 * 128, LINE = D + 8;
    __shared__ __align__(16) T staged[QUERIES * LINE];
    const RowBlock block(a);
    const int2 tile = a.tiles[block.tile];
    const float4* accumulator = reinterpret_cast<const float4*>(a.accumulator + block.at * (D * QUERIES));
#pragma unroll
    for (int i = 0; i < D * QUERIES / 4 / 256; ++i) {
        const int word = i * 256 + threadIdx.x, part = word / WORDS, thread = word % 128;
        const float4 x = accumulator[word];
        const int query = (D == 128 ? 0 : part * COLUMNS) + word % WORDS / 128 * 8 + thread % 4 * 2;
        const int column = (D == 128 ? part * 64 : 0) + thread / 32 * 16 + thread % 32 / 4;
        T* to = staged + query * LINE + column;
        to[0] = T(x.x * a.scale);
        to[LINE] = T(x.y * a.scale);
        to[8] = T(x.z * a.scale);
        to[LINE + 8] = T(x.w * a.scale);
    }
    __syncthreads();
    constexpr int LANES = D / 8;
    for (int row = threadIdx.x / LANES; row < tile.y; row += 256 / LANES) {
        const int64_t token = tile.x + row;
        T* out = static_cast<T*>(a.dq) + ((block.sample * a.length + token) * a.heads + block.head) * D;
        const int at = threadIdx.x % LANES * 8;
        *reinterpret_cast<uint4*>(out + at) = *reinterpret_cast<const uint4*>(staged + row * LINE + at);
    }
}

template <typename T, int D, int QUERIES>
cudaError_t launch_backward_prepare(const BackwardRows& a, cudaStream_t stream) {
    const unsigned blocks = unsigned(a.batch * a.heads * a.tile_count);
    backward_prepare_kernel<T, D, QUERIES><<<blocks, 256, 0, stream>>>(a);
    return cudaGetLastError();
}

template <typename T, int D, int QUERIES>
cudaError_t launch_backward_finish(const BackwardRows& a, cudaStream_t stream) {
    const unsigned blocks = unsigned(a.batch * a.heads * a.tile_count);
    backward_finish_kernel<T, D, QUERIES><<<blocks, 256, 0, stream>>>(a);
    return cudaGetLastError();
}

}  // namespace raven
