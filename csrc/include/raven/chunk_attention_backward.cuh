// Backward of chunk_attention on Hopper: gradients of keys and values stay in the registers of the block that owns the
// key tile, gradients of queries are added in float32 to an accumulator in global memory. Scores are held transposed,
// [keys x queries], so that weights and their gradients feed the products from registers.
//
// Of one block, warpgroup 0 copies and adds, warpgroups 1 and 2 own 64 keys each.
#pragma once

#include <algorithm>
#include <type_traits>

#include "chunk_attention_backward_copies.cuh"
#include "chunk_attention_backward_tile.cuh"
#include "tensor_map.h"

namespace raven {

template <typename T, typename Tile>
__device__ __forceinline__ void consume_backward(typename Tile::Shared& shared, const BackwardArguments& a, int group) {
    constexpr int D = Tile::HEAD_DIM, QUERIES = Tile::QUERIES, STEPS = QUERIES / 16;
    using Scores = Wgmma<T, QUERIES>;
    using Keys = Wgmma<T, D>;
    using Queries = Wgmma<T, Tile::DQ_COLUMNS>;
    const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = thread / 32;
    const float scale_log2 = a.scale * 1.4426950408889634f;

    float dk[D / 2], dv[D / 2];
    float s[QUERIES / 2];   // scores, then weights
    float dp[QUERIES / 2];  // gradients of the weights, and dQ^T, never both
    float (&dq)[Tile::DQ_COLUMNS / 2] = reinterpret_cast<float (&)[Tile::DQ_COLUMNS / 2]>(dp);
    uint32_t p16[STEPS][4], ds16[STEPS][4];

    const uint64_t k_rows = descriptor_k_major(shared_address(shared.k) + group * 64 * 128);
    const uint64_t v_rows = descriptor_k_major(shared_address(shared.v) + group * 64 * 128);
    const uint64_t k_columns =
        descriptor_mn_major(shared_address(shared.k) + (D == 128 ? group * Tile::K_PANEL : 0), 0);
    // Where a lane's row goes when dS^T is stored as dS; the next 16 queries are 2,048 bytes further.
    const uint32_t ds_lane = (lane / 16 * 8 + lane % 8) * 128 + (((2 * warp + lane / 8 % 2) ^ (lane % 8)) * 16);

    // d = a (own 64 rows of keys or values) times the transpose of a tile of queries or gradients.
    const auto issue_scores = [&](float (&d)[QUERIES / 2], uint64_t rows, uint8_t* tile) {
        const uint64_t b = descriptor_k_major(shared_address(tile));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            Scores::template ss<false, false>(d, advance(rows, i / 4 * Tile::K_PANEL + i % 4 * 32),
                                              advance(b, i / 4 * Tile::Q_PANEL + i % 4 * 32), i > 0);
        }
        wgmma_commit();
    };
    // The j-th 16 rows of a tile, to be summed over.
    const auto columns_of = [](uint8_t* tile, int j) {
        return descriptor_mn_major(shared_address(tile) + j * 2048, Tile::Q_PANEL);
    };
    // dQ^T = K^T dS^T over all 128 keys: with head_dim 128 each warpgroup has half of the columns, else of the queries.
    const auto issue_queries = [&](int buffer) {
        const uint64_t b =
            descriptor_k_major(shared_address(shared.ds[buffer]) + (D == 128 ? 0 : group * Tile::DQ_COLUMNS * 128));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            Queries::template ss<true, false>(dq, advance(k_columns, i * 2048),
                                              advance(b, i / 4 * Tile::Q_PANEL + i % 4 * 32), i > 0);
        }
        wgmma_commit();
    };
    // Scores of some of the queries to weights.
    const auto weigh = [&](const float* rows, int first, int last) {
#pragma unroll
        for (int j = first; j < last; ++j) {
            const float2 lse = *reinterpret_cast<const float2*>(rows + 8 * j + lane % 4 * 2);
            s[4 * j] = exp2_fast(s[4 * j] * scale_log2 - lse.x);
            s[4 * j + 1] = exp2_fast(s[4 * j + 1] * scale_log2 - lse.y);
            s[4 * j + 2] = exp2_fast(s[4 * j + 2] * scale_log2 - lse.x);
            s[4 * j + 3] = exp2_fast(s[4 * j + 3] * scale_log2 - lse.y);
        }
    };
    const auto stage_queries = [&](uint32_t step) {
        barrier_wait(shared.dq_empty[group], ~step & 1);
#pragma unroll
        for (int i = 0; i < Tile::DQ_COLUMNS / 8; ++i) {
            *reinterpret_cast<float4*>(shared.dq[group] + (i * 128 + thread) * 16) =
                make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
        }
    };
    const auto publish_queries = [&] {  // takes its time, so the next product is under way before
        fence_async_proxy();
        named_arrive(PARTS + group, 160);
    };

    uint32_t step = 0, parity = 0;
    while (true) {
        barrier_wait(shared.k_full, parity);
        if (shared.item.y == 0) break;
        const bool partial = shared.item.y < Tile::KEYS;
        if (partial) clear_rows<Tile::PANELS, Tile::KEYS>(shared.k, shared.item.y);
#pragma unroll
        for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0.f;

        int queries;  // left in the visit
        const auto start_scores = [&] {
            const uint32_t at = step & 1;
            barrier_wait(shared.q_full[at], step >> 1 & 1);
            queries = shared.info[step % Tile::INFOS].y;
            if (queries < QUERIES) clear_rows<Tile::PANELS, QUERIES>(shared.q[at], queries);
            issue_scores(s, k_rows, shared.q[at]);
        };
        const auto start_weight_gradients = [&] {
            const uint32_t at = step & 1;
            barrier_wait(shared.g_full[at], step >> 1 & 1);
            if (queries < QUERIES) clear_rows<Tile::PANELS, QUERIES>(shared.g[at], queries);
            issue_scores(dp, v_rows, shared.g[at]);
        };
        const auto release = [&](uint32_t used) {  // after the products with these queries
            pin(dk);
            pin(dv);
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) asm volatile("" ::"r"(p16[i][j]), "r"(ds16[i][j]));
            }
            arrive_lanes(shared.q_empty[used]);
            arrive_warp(shared.g_empty[used]);
        };

        start_scores();
        barrier_wait(shared.v_full, parity);
        if (partial) clear_rows<Tile::PANELS, Tile::KEYS>(shared.v, shared.item.y);
        parity ^= 1;
        wgmma_wait<0>();
        pin(s);
        weigh(shared.rows[step & 1], 0, STEPS);
        start_weight_gradients();

        uint32_t used;
        while (true) {  // half of the weights are there, and the gradients of the weights are under way
            used = step & 1;
            const float* rows = shared.rows[used];
            weigh(rows, STEPS, 2 * STEPS);
            wgmma_wait<0>();
            pin(dp);
            const uint32_t ds_at = shared_address(shared.ds[used]) + group * Tile::Q_PANEL + ds_lane;
#pragma unroll
            for (int j = 0; j < STEPS; ++j) {  // products of 16 queries start as soon as their operands are there
                const float2 x = *reinterpret_cast<const float2*>(rows + QUERIES + 16 * j + lane % 4 * 2);
                const float2 y = *reinterpret_cast<const float2*>(rows + QUERIES + 16 * j + 8 + lane % 4 * 2);
                const float delta[4] = {x.x, x.y, y.x, y.y};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int at = 8 * j + 2 * i, column = i / 2 * 2;
                    p16[j][i] = pack_pair<T>(s[at], s[at + 1]);
                    ds16[j][i] =
                        pack_pair<T>(s[at] * (dp[at] - delta[column]), s[at + 1] * (dp[at + 1] - delta[column + 1]));
                }
                if (partial) {  // a cleared key still has a weight, of a score of 0
                    const int row = group * 64 + thread / 32 * 16 + lane / 4, present = shared.item.y;
                    if (row >= present) ds16[j][0] = ds16[j][2] = 0;
                    if (row + 8 >= present) ds16[j][1] = ds16[j][3] = 0;
                }
                asm volatile(
                    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(ds_at + j * 2048),
                    "r"(ds16[j][0]), "r"(ds16[j][1]), "r"(ds16[j][2]), "r"(ds16[j][3])
                    : "memory");
                wgmma_fence();
                Keys::template rs<true>(dv, p16[j], columns_of(shared.g[used], j), 1);
                Keys::template rs<true>(dk, ds16[j], columns_of(shared.q[used], j), 1);
            }
            wgmma_commit();
            fence_async_proxy();
            arrive_warp(shared.ds_full[used]);

            const bool end = queries <= QUERIES && shared.info[step % Tile::INFOS].w & LAST_VISIT;
            ++step;
            if (end) break;
            start_scores();
            wgmma_wait<1>();
            release(used);
            barrier_wait(shared.ds_full[used], (step - 1) >> 1 & 1);
            issue_queries(used);
            wgmma_wait<1>();
            pin(s);
            weigh(shared.rows[step & 1], 0, STEPS);
            wgmma_wait<0>();
            pin(dq);
            stage_queries(step - 1);
            start_weight_gradients();
            publish_queries();
        }
        wgmma_wait<0>();
        release(used);
        barrier_wait(shared.ds_full[used], (step - 1) >> 1 & 1);
        issue_queries(used);
        wgmma_wait<0>();
        pin(dq);
        stage_queries(step - 1);
        publish_queries();
        const int4 item = shared.item;
        arrive_lanes(shared.kv_empty);
        const int64_t row_stride = int64_t(a.heads / a.group) * D;
        const int64_t at = (int64_t(item.w) * a.keys + item.x + group * 64) * row_stride + item.z * D;
        store_gradient<T, D>(dv, static_cast<T*>(a.dv) + at, row_stride, item.y - group * 64, 1.f);
        store_gradient<T, D>(dk, static_cast<T*>(a.dk) + at, row_stride, item.y - group * 64, a.scale);
    }
    barrier_wait(shared.dq_empty[group], ~step & 1);
    named_arrive(PARTS + group, 160);
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(384, 1)
    backward_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                    const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_g,
                    const __grid_constant__ BackwardArguments a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& shared = *reinterpret_cast<typename Tile::Shared*>(memory);
    if (threadIdx.x == 0) {
        prefetch_map(&map_q);
        prefetch_map(&map_k);
        prefetch_map(&map_v);
        prefetch_map(&map_g);
        barrier_init(shared.k_full, 1);
        barrier_init(shared.v_full, 1);
        // Threads, each of which arrives. As a constant it makes ptxas run out of registers for the products (C7511).
        const uint32_t consumers = blockDim.x - 128;
        barrier_init(shared.kv_empty, consumers);
        for (int i = 0; i < Tile::STAGES; ++i) {
            barrier_init(shared.q_full[i], 1);
            barrier_init(shared.q_empty[i], consumers);
            barrier_init(shared.g_full[i], 1);
            barrier_init(shared.g_empty[i], 8);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(shared.ds_full[i], 8);
            barrier_init(shared.dq_empty[i], 1);
        }
        fence_barrier_init();
    }
    __syncthreads();
    const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
    if (warpgroup == 0) {
        give_registers<24>();
        const int warp = threadIdx.x / 32;
        if (threadIdx.x == 0) produce_backward<Tile>(shared, map_q, map_k, map_v, map_g, a);
        if (warp == 1 || warp == 2) add_queries<Tile>(shared, a, warp - 1);
    } else {
        take_registers<240>();
        consume_backward<T, Tile>(shared, a, warpgroup - 1);
    }
}

struct BackwardTensors {
    const void *q, *k, *v, *g;
    Strides q_strides, k_strides, v_strides, g_strides;
    int64_t batch, queries;
    int sms;
};

template <typename T, typename Tile>
cudaError_t launch_backward(const BackwardTensors& x, const BackwardArguments& a, cudaStream_t stream) {
    constexpr auto type =
        std::is_same_v<T, __nv_bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    constexpr int D = Tile::HEAD_DIM;
    CUtensorMap q, k, v, g;
    const int kv_heads = a.heads / a.group;
    cudaError_t status = make_tensor_map(&q, type, x.q, x.batch, x.queries, a.heads, D, x.q_strides, Tile::QUERIES);
    if (status != cudaSuccess) return status;
    status = make_tensor_map(&g, type, x.g, x.batch, x.queries, a.heads, D, x.g_strides, Tile::QUERIES);
    if (status != cudaSuccess) return status;
    status = make_tensor_map(&k, type, x.k, x.batch, a.keys, kv_heads, D, x.k_strides, Tile::KEYS);
    if (status != cudaSuccess) return status;
    status = make_tensor_map(&v, type, x.v, x.batch, a.keys, kv_heads, D, x.v_strides, Tile::KEYS);
    if (status != cudaSuccess) return status;
    const auto kernel = backward_kernel<T, Tile>;
    constexpr int bytes = sizeof(typename Tile::Shared);
    static_assert(bytes <= 232448, "shared memory of an SM");
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    kernel<<<std::min(x.sms, a.item_count), Tile::THREADS, bytes, stream>>>(q, k, v, g, a);
    return cudaGetLastError();
}

}  // namespace raven
