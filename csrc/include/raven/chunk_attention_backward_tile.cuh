// What the parts of the backward of chunk_attention share: arguments, the layout of shared memory, small tools.
#pragma once

#include <cuda_runtime.h>

#include "hopper.cuh"
#include "wgmma.cuh"

namespace raven {

struct BackwardArguments {
    const int2* items;        // key tile, kv head + kv heads * sample; the most expensive first
    const int4* key_tiles;    // first key, keys, run of keys, number of the tile in its run
    const int* visit_indptr;  // of the runs of keys
    const int4* visits;       // first query, queries, first query tile, key tiles of earlier runs that visit them
    const float* rows;        // [B, H, tiles, 2, QUERIES]: log-sum-exp in base 2, then delta
    float* dq;                // [B, H, tiles, D * QUERIES], in the order that the consumers' registers hold
    int* next_item;           // zero
    int* turns;               // [B, H, tiles, 2] zeros: parts are added in the order of the items; null: in any order
    void *dk, *dv;            // [B, Lk, Hkv, D]
    int item_count, tiles, heads, group;
    int64_t keys;
    float scale;
};

constexpr int LAST_VISIT = 1 << 30;  // beside the turn of a visit

template <int D, int QUERIES_>
struct BackwardTile {
    static constexpr int HEAD_DIM = D, QUERIES = QUERIES_, KEYS = 128, STAGES = 2, PANELS = D / 64, THREADS = 384;
    static constexpr int INFOS = 4;  // the adding warps are at most that many steps behind the copying one
    static constexpr int DQ_COLUMNS = D == 128 ? QUERIES : QUERIES / 2;  // of a warpgroup's part of dQ^T, 64 rows
    static constexpr uint32_t Q_PANEL = QUERIES * 128, K_PANEL = KEYS * 128;
    static constexpr uint32_t ROW_BYTES = 2 * QUERIES * sizeof(float), PART_BYTES = 64 * DQ_COLUMNS * sizeof(float);

    struct Shared {
        alignas(1024) uint8_t k[PANELS * K_PANEL];
        alignas(1024) uint8_t v[PANELS * K_PANEL];
        alignas(1024) uint8_t q[STAGES][PANELS * Q_PANEL];
        alignas(1024) uint8_t g[STAGES][PANELS * Q_PANEL];
        alignas(1024) uint8_t ds[2][2 * Q_PANEL];  // [queries x 64 keys] of each warpgroup
        alignas(1024) uint8_t dq[2][PART_BYTES];   // of each warpgroup
        alignas(16) float rows[STAGES][2 * QUERIES];
        int4 info[INFOS];  // of the recent steps: first query, queries left in the visit, query tile or -1, turn
        int4 kept;         // of the copying warp: parity, run of keys, number of the tile in it
        int4 item;         // first key, keys or 0, kv head, sample
        uint64_t k_full, v_full, kv_empty, q_full[STAGES], q_empty[STAGES], g_full[STAGES], g_empty[STAGES];
        uint64_t ds_full[2], dq_empty[2];
    };
};

// Named barriers: 1 for both consumer warpgroups, 2 and 3 for one of them and the warp that adds its part of dQ.
constexpr uint32_t CONSUMERS = 1, PARTS = 2;

// One arrival for the warp. A branch would do, but makes the compiler give up uniform registers in the loop around it.
__device__ __forceinline__ void arrive_warp(uint64_t& barrier) {
    __syncwarp();
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.u32 p, %1, 0;\n"
        "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}\n" ::"r"(shared_address(&barrier)),
        "r"(threadIdx.x % 32)
        : "memory");
}

// An arrival of every lane, for what all of them have read: racecheck does not see that a warp met before one arrived.
__device__ __forceinline__ void arrive_lanes(uint64_t& barrier) {
    __syncwarp();
    barrier_arrive(barrier);
}

// Rows behind a range belong to somebody else, and 0 times NaN is NaN: both consumer warpgroups clear them together.
template <int PANELS, int ROWS>
__device__ __forceinline__ void clear_rows(uint8_t* tile, int rows) {
    const int thread = threadIdx.x - 128;
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
        for (int at = rows * 128 + thread * 16; at < ROWS * 128; at += 256 * 16) {
            *reinterpret_cast<uint4*>(tile + panel * ROWS * 128 + at) = make_uint4(0, 0, 0, 0);
        }
    }
    fence_async_proxy();
    named_sync(CONSUMERS, 256);
}

// A 4 x 4 transpose over the threads of a quad: thread t ends with word t of all four.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4]) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            const bool upper = lane & bit;
            const uint32_t sent = upper ? word[i] : word[i | bit];
            const uint32_t got = __shfl_xor_sync(0xFFFFFFFF, sent, bit);
            (upper ? word[i] : word[i | bit]) = got;
        }
    }
}

// A warpgroup's [64 x D] accumulators to rows of global memory, those below `rows` only.
template <typename T, int D>
__device__ __forceinline__ void store_gradient(const float (&d)[D / 2], T* out, int64_t row_stride, int rows,
                                               float factor) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        T* line = out + (row + 8 * half) * row_stride + lane % 4 * 8;
#pragma unroll
        for (int j = 0; j < D / 32; ++j) {
            uint32_t word[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = 16 * j + 4 * i + 2 * half;
                word[i] = pack_pair<T>(d[at] * factor, d[at + 1] * factor);
            }
            transpose_quad(word);
            if (row + 8 * half < rows) {
                *reinterpret_cast<uint4*>(line + 32 * j) = make_uint4(word[0], word[1], word[2], word[3]);
            }
        }
    }
}

}  // namespace raven
