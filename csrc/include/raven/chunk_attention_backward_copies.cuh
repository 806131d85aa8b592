// The copying warps of the backward of chunk_attention: one fetches tiles, two add parts of dQ to the accumulator.
#pragma once

#include "chunk_attention_backward_tile.cuh"

namespace raven {

// Takes items and copies their tiles, two steps ahead of the consumers. One thread.
template <typename Tile>
__device__ __forceinline__ void produce_backward(typename Tile::Shared& shared, const CUtensorMap& map_q,
                                                 const CUtensorMap& map_k, const CUtensorMap& map_v,
                                                 const CUtensorMap& map_g, const BackwardArguments& a) {
    volatile int4& kept = shared.kept;  // what would not fit the few registers of this warpgroup
    uint32_t step = 0;
    for (kept.x = 1;; kept.x ^= 1) {
        const int next = atomicAdd(a.next_item, 1);
        barrier_wait(shared.kv_empty, kept.x);
        if (next >= a.item_count) break;
        const int4 tile = a.key_tiles[a.items[next].x];
        int head = a.items[next].y;
        int sample = head / (a.heads / a.group);
        head -= sample * (a.heads / a.group);
        shared.item = make_int4(tile.x, tile.y, head, sample);
        kept.y = tile.z;
        kept.z = tile.w;
        barrier_expect(shared.k_full, sizeof(shared.k));
#pragma unroll
        for (int panel = 0; panel < Tile::PANELS; ++panel) {
            copy_tile(shared_address(shared.k) + panel * Tile::K_PANEL, &map_k, shared.k_full, panel * 64, tile.x, head,
                      sample);
        }
        barrier_expect(shared.v_full, sizeof(shared.v));
#pragma unroll
        for (int panel = 0; panel < Tile::PANELS; ++panel) {
            copy_tile(shared_address(shared.v) + panel * Tile::K_PANEL, &map_v, shared.v_full, panel * 64, tile.x, head,
                      sample);
        }
        const volatile int4& item = shared.item;
#pragma unroll 1
        for (head = item.z * a.group; head < (item.z + 1) * a.group; ++head) {
            sample = item.w;
#pragma unroll 1
            for (int i = a.visit_indptr[kept.y]; i < a.visit_indptr[kept.y + 1]; ++i) {
                int4 visit = a.visits[i];
                visit.z += (sample * a.heads + head) * a.tiles;
                visit.w += kept.z;
                if (head + 1 == (item.z + 1) * a.group && i + 1 == a.visit_indptr[kept.y + 1]) visit.w |= LAST_VISIT;
#pragma unroll 1
                while (visit.y > 0) {
                    const uint32_t at = step & 1, before = ~step >> 1 & 1;
                    barrier_wait(shared.q_empty[at], before);
                    shared.info[step % Tile::INFOS] = visit;
                    barrier_expect(shared.q_full[at], sizeof(shared.q[0]) + Tile::ROW_BYTES);
#pragma unroll
                    for (int panel = 0; panel < Tile::PANELS; ++panel) {
                        copy_tile(shared_address(shared.q[at]) + panel * Tile::Q_PANEL, &map_q, shared.q_full[at],
                                  panel * 64, visit.x, head, sample);
                    }
                    copy_bytes(shared_address(shared.rows[at]), a.rows + int64_t(visit.z) * (2 * Tile::QUERIES),
                               shared.q_full[at], Tile::ROW_BYTES);
                    barrier_wait(shared.g_empty[at], before);
                    barrier_expect(shared.g_full[at], sizeof(shared.g[0]));
#pragma unroll
                    for (int panel = 0; panel < Tile::PANELS; ++panel) {
                        copy_tile(shared_address(shared.g[at]) + panel * Tile::Q_PANEL, &map_g, shared.g_full[at],
                                  panel * 64, visit.x, head, sample);
                    }
                    visit.x += Tile::QUERIES;
                    visit.y -= Tile::QUERIES;
                    ++visit.z;
                    ++step;
                }
            }
        }
    }
    shared.item = make_int4(0, 0, 0, 0);
    shared.info[step % Tile::INFOS] = make_int4(0, 0, -1, 0);
    barrier_arrive(shared.k_full);
}

__device__ __forceinline__ int load_acquire(const int* pointer) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(value) : "l"(pointer) : "memory");
    return value;
}

__device__ __forceinline__ void add_release(int* pointer, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;\n" ::"l"(pointer), "r"(value) : "memory");
}

// Adds one warpgroup's part of each dQ tile to the accumulator. A whole warp, because it meets at a named barrier.
template <typename Tile>
__device__ __forceinline__ void add_queries(typename Tile::Shared& shared, const BackwardArguments& a, int part) {
#pragma unroll 1
    for (uint32_t step = 0;; ++step) {
        named_sync(PARTS + part, 160);
        int4 info = make_int4(0, 0, 0, 0);  // read by the lane that then arrives at dq_empty
        if (threadIdx.x % 32 == 0) info = shared.info[step % Tile::INFOS];
        if (__shfl_sync(0xFFFFFFFF, info.z, 0) < 0) break;
        if (threadIdx.x % 32 == 0) {
            const int64_t tile = info.z;
            float* to = a.dq + tile * (Tile::HEAD_DIM * Tile::QUERIES) + part * (Tile::PART_BYTES / sizeof(float));
            int* turn = a.turns == nullptr ? nullptr : a.turns + 2 * tile + part;
            if (turn != nullptr) {
                while (load_acquire(turn) != (info.w & ~LAST_VISIT)) __nanosleep(20);
                asm volatile("fence.proxy.async.global;\n" ::: "memory");
            }
            reduce_add(to, shared_address(shared.dq[part]), Tile::PART_BYTES);
            bulk_commit();
            bulk_wait_read<0>();
            barrier_arrive(shared.dq_empty[part]);
            if (turn != nullptr) {
                bulk_wait<0>();
                asm volatile("fence.proxy.async.global;\n" ::: "memory");
                add_release(turn, 1);
            }
        }
        __syncwarp();
    }
    bulk_wait<0>();
}

}  // namespace raven
