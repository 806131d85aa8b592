// Forward of chunk_attention on Hopper. One block an SM: a producer warp copies tiles, two consumer warpgroups of 64
// query rows each take turns between products and exponentials. Blocks take work from a list by one counter.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "hopper.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace raven {

// A tile of queries of one head and a run of its key steps. Where `parts` is more than 1 the tile's keys are split, and
// whoever finishes last merges the parts, in their order.
struct alignas(16) ForwardWork {
    int q_start, q_length, head, first_step;
    int steps, part, parts, slot;  // slot: of the first part in the workspace
};

struct ForwardArguments {
    const ForwardWork* work;  // longest first; every sample of the batch does all of it
    const int2* steps;        // first key and number of keys, at most those of a tile
    int work_count, slot_count, batch;
    int* counters;     // zeros: [0] next work, then two of each slot of each sample
    float* workspace;  // [batch, slot_count, 2, D / 2 + 4, 128]
    void* out;         // [B, L, H, D]
    float* lse;        // [B, H, L]
    int64_t length;
    int heads, group;  // group: query heads of one key head
    float scale;
};

template <int D>
struct ForwardTile {
    static constexpr int ROWS = 128, KEYS = 128, STAGES = 2, PANELS = D / 64, THREADS = 384;
    static constexpr uint32_t Q_PANEL = ROWS * 128, KV_PANEL = KEYS * 128;

    struct Shared {
        alignas(1024) uint8_t q[PANELS * Q_PANEL];
        alignas(1024) uint8_t k[STAGES][PANELS * KV_PANEL];
        alignas(1024) uint8_t v[STAGES][PANELS * KV_PANEL];
        uint64_t q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
        uint64_t work_full[2], work_empty[2];
        ForwardWork work[2];
        int batch[2];
        int keys[STAGES];  // of the step in each stage
        int arrived[2];
    };
};

template <int D>
__device__ __forceinline__ void produce_forward(typename ForwardTile<D>::Shared& shared, const CUtensorMap& map_q,
                                                const CUtensorMap& map_k, const CUtensorMap& map_v,
                                                const ForwardArguments& a) {
    using Tile = ForwardTile<D>;
    Ring<Tile::STAGES> stage;
    Ring<2> slot;
    uint32_t q_parity = 0;
    const int total = a.work_count * a.batch;
    int next = atomicAdd(a.counters, 1);
    while (true) {
        const bool done = next >= total;
        const int batch = done ? 0 : next / a.work_count;
        ForwardWork work{};
        if (!done) work = a.work[next - batch * a.work_count];
        barrier_wait(shared.work_empty[slot.index], slot.parity ^ 1);
        if (done) work.steps = -1;
        shared.work[slot.index] = work;
        shared.batch[slot.index] = batch;
        barrier_arrive(shared.work_full[slot.index]);
        slot.next();
        if (done) break;
        next = atomicAdd(a.counters, 1);  // long before it is needed
        if (work.steps == 0) continue;

        const int2* steps = a.steps + work.first_step;
        int2 step = steps[0];
        barrier_wait(shared.q_empty, q_parity ^ 1);
        q_parity ^= 1;
        barrier_expect(shared.q_full, sizeof(shared.q));
#pragma unroll
        for (int panel = 0; panel < Tile::PANELS; ++panel) {
            copy_tile(shared_address(shared.q) + panel * Tile::Q_PANEL, &map_q, shared.q_full, panel * 64, work.q_start,
                      work.head, batch);
        }
        const int head = work.head / a.group;
        for (int i = 0; i < work.steps; ++i) {
            const int2 following = steps[min(i + 1, work.steps - 1)];
            barrier_wait(shared.k_empty[stage.index], stage.parity ^ 1);
            shared.keys[stage.index] = step.y;
            barrier_expect(shared.k_full[stage.index], sizeof(shared.k[0]));
#pragma unroll
            for (int panel = 0; panel < Tile::PANELS; ++panel) {
                copy_tile(shared_address(shared.k[stage.index]) + panel * Tile::KV_PANEL, &map_k,
                          shared.k_full[stage.index], panel * 64, step.x, head, batch);
            }
            barrier_wait(shared.v_empty[stage.index], stage.parity ^ 1);
            barrier_expect(shared.v_full[stage.index], sizeof(shared.v[0]));
#pragma unroll
            for (int panel = 0; panel < Tile::PANELS; ++panel) {
                copy_tile(shared_address(shared.v[stage.index]) + panel * Tile::KV_PANEL, &map_v,
                          shared.v_full[stage.index], panel * 64, step.x, head, batch);
            }
            stage.next();
            step = following;
        }
    }
}

// Softmax statistics of the two rows that a thread holds; the sum is over the thread's own columns until the end.
struct Statistics {
    float maximum[2], sum[2];
};

// Turns scores into weights relative to the new maximum; `correction` brings what was summed before to it.
template <int KEYS>
__device__ __forceinline__ void softmax_step(float (&scores)[KEYS / 2], Statistics& statistics, float (&correction)[2],
                                             int keys, float scale_log2) {
    if (keys < KEYS) {  // the columns behind the range belong to somebody else
        const int column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) {
            if (column + i / 4 * 8 + i % 2 >= keys) scores[i] = -INFINITY;
        }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float maximum = statistics.maximum[row];
#pragma unroll
        for (int i = row * 2; i < KEYS / 2; i += 4) maximum = fmaxf(maximum, fmaxf(scores[i], scores[i + 1]));
        maximum = fmaxf(maximum, __shfl_xor_sync(0xFFFFFFFF, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(0xFFFFFFFF, maximum, 2));
        const float reference = maximum == -INFINITY ? 0.f : maximum * scale_log2;  // -inf - -inf would be NaN
        correction[row] = exp2_fast(statistics.maximum[row] * scale_log2 - reference);
        statistics.maximum[row] = maximum;
        float sum = statistics.sum[row] * correction[row];
#pragma unroll
        for (int i = row * 2; i < KEYS / 2; i += 4) {
            scores[i] = exp2_fast(fmaf(scores[i], scale_log2, -reference));
            scores[i + 1] = exp2_fast(fmaf(scores[i + 1], scale_log2, -reference));
            sum += scores[i] + scores[i + 1];
        }
        statistics.sum[row] = sum;
    }
}

// Two rows of 8-column groups, four threads a row, to 16-byte stores: a 4 x 4 transposition of words between the four.
template <typename T, int D>
__device__ __forceinline__ void store_rows(const float (&o)[D / 2], T* out, int64_t row_stride, int row, int rows,
                                           float (&factor)[2]) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool inside = row + half * 8 < rows;
        T* line = out + (row + half * 8) * row_stride;
#pragma unroll
        for (int block = 0; block < D / 32; ++block) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = o + (block * 4 + i) * 4 + half * 2;
                words[i] = pack_pair<T>(pair[0] * factor[half], pair[1] * factor[half]);
            }
#pragma unroll
            for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (i & bit) continue;
                    const bool upper = lane & bit;
                    const uint32_t other = __shfl_xor_sync(0xFFFFFFFF, upper ? words[i] : words[i ^ bit], bit);
                    (upper ? words[i] : words[i ^ bit]) = other;
                }
            }
            if (inside) {
                *reinterpret_cast<uint4*>(line + block * 32 + lane * 8) =
                    make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }
}

// Leaves a part in the workspace; true for the warpgroup that came last and now holds the merged result.
template <int D>
__device__ __forceinline__ bool merge_parts(float (&o)[D / 2], Statistics& statistics, const ForwardArguments& a,
                                            const ForwardWork& work, int64_t slot, int group, int& arrived) {
    constexpr int FLOATS = D / 2 + 4;
    const int thread = threadIdx.x % 128;
    float* parts = a.workspace + (slot * 2 + group) * FLOATS * 128 + thread;
    const int64_t stride = 2 * FLOATS * 128;
    float* mine = parts + work.part * stride;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) mine[i * 128] = o[i];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        mine[(D / 2 + row) * 128] = statistics.maximum[row];
        mine[(D / 2 + 2 + row) * 128] = statistics.sum[row];
    }
    __threadfence();
    named_sync(3 + group, 128);
    if (thread == 0) arrived = atomicAdd(a.counters + 1 + slot * 2 + group, 1);
    named_sync(3 + group, 128);
    if (arrived != work.parts - 1) return false;
    __threadfence();

    const float scale_log2 = a.scale * float(M_LOG2E);
    float reference[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float maximum = -INFINITY;
        for (int part = 0; part < work.parts; ++part) {
            maximum = fmaxf(maximum, __ldcg(parts + part * stride + (D / 2 + row) * 128));
        }
        statistics.maximum[row] = maximum;
        statistics.sum[row] = 0.f;
        reference[row] = maximum == -INFINITY ? 0.f : maximum * scale_log2;
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0.f;
    for (int part = 0; part < work.parts; ++part) {
        const float* theirs = parts + part * stride;
        float factor[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            factor[row] = exp2_fast(__ldcg(theirs + (D / 2 + row) * 128) * scale_log2 - reference[row]);
            statistics.sum[row] += factor[row] * __ldcg(theirs + (D / 2 + 2 + row) * 128);
        }
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] += factor[i / 2 % 2] * __ldcg(theirs + i * 128);
    }
    return true;
}

template <typename T, int D>
__device__ __forceinline__ void consume_forward(typename ForwardTile<D>::Shared& shared, const ForwardArguments& a,
                                                int group) {
    using Tile = ForwardTile<D>;
    constexpr int KEYS = Tile::KEYS;
    const int lane = threadIdx.x % 32, thread = threadIdx.x % 128;
    const float scale_log2 = a.scale * float(M_LOG2E);
    const uint64_t q_rows = descriptor_k_major(shared_address(shared.q) + group * 64 * 128);
    Ring<Tile::STAGES> k_stage, v_stage;
    Ring<2> slot;
    uint32_t q_parity = 0;
    float scores[KEYS / 2], o[D / 2];
    uint32_t weights[KEYS / 16][4];

    const auto release = [&](uint64_t& barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier);
    };
    // Read by the thread that then releases the stage: no other may still read when the producer writes the next.
    const auto keys_of_step = [&] { return __shfl_sync(0xFFFFFFFF, lane == 0 ? shared.keys[k_stage.index] : 0, 0); };
    const auto issue_scores = [&] {
        const uint64_t k_rows = descriptor_k_major(shared_address(shared.k[k_stage.index]));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            Wgmma<T, KEYS>::template ss<false, false>(scores, advance(q_rows, i / 4 * Tile::Q_PANEL + i % 4 * 32),
                                                      advance(k_rows, i / 4 * Tile::KV_PANEL + i % 4 * 32), i > 0);
        }
        wgmma_commit();
    };
    const auto issue_values = [&](bool accumulate) {
        const uint64_t v_rows = descriptor_mn_major(shared_address(shared.v[v_stage.index]), Tile::KV_PANEL);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < KEYS / 16; ++i) {
            Wgmma<T, D>::template rs<true>(o, weights[i], advance(v_rows, i * 2048), accumulate || i > 0);
        }
        wgmma_commit();
    };
    // A weight of 0 does not silence a NaN: the value rows behind the range become zeros. Both warpgroups write all.
    const auto clear_values_behind = [&](int keys) {
        if (keys == KEYS) return;
        barrier_wait(shared.v_full[v_stage.index], v_stage.parity);
#pragma unroll
        for (int panel = 0; panel < Tile::PANELS; ++panel) {
            uint8_t* rows = shared.v[v_stage.index] + panel * Tile::KV_PANEL;
            for (int at = keys * 128 + thread * 16; at < int(Tile::KV_PANEL); at += 128 * 16) {
                *reinterpret_cast<uint4*>(rows + at) = make_uint4(0, 0, 0, 0);
            }
        }
        fence_async_proxy();
        named_sync(3 + group, 128);
    };
    const auto round_weights = [&] {
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) weights[i / 4][i % 4] = pack_pair<T>(scores[2 * i], scores[2 * i + 1]);
    };

    if (group == 1) named_arrive(1, 256);  // the other warpgroup has the first turn
    while (true) {
        barrier_wait(shared.work_full[slot.index], slot.parity);
        const ForwardWork work = shared.work[slot.index];
        const int batch = shared.batch[slot.index];
        release(shared.work_empty[slot.index]);
        slot.next();
        if (work.steps < 0) break;

        Statistics statistics{{-INFINITY, -INFINITY}, {0.f, 0.f}};
        if (work.steps > 0) {
            float correction[2];
            barrier_wait(shared.q_full, q_parity);
            q_parity ^= 1;
            barrier_wait(shared.k_full[k_stage.index], k_stage.parity);
            int keys = keys_of_step();
            named_sync(1 + group, 256);
            issue_scores();
            named_arrive(2 - group, 256);
            wgmma_wait<0>();
            pin(scores);
            release(shared.k_empty[k_stage.index]);
            k_stage.next();
            softmax_step<KEYS>(scores, statistics, correction, keys, scale_log2);
            round_weights();
            for (int i = 1; i < work.steps; ++i) {
                clear_values_behind(keys);
                barrier_wait(shared.k_full[k_stage.index], k_stage.parity);
                keys = keys_of_step();
                named_sync(1 + group, 256);
                issue_scores();
                barrier_wait(shared.v_full[v_stage.index], v_stage.parity);
                issue_values(i > 1);
                named_arrive(2 - group, 256);
                wgmma_wait<1>();
                pin(scores);
                release(shared.k_empty[k_stage.index]);
                k_stage.next();
                softmax_step<KEYS>(scores, statistics, correction, keys, scale_log2);
                compute_before_waiting(statistics.sum[0], statistics.sum[1]);  // sums of exponentials are never -1
                wgmma_wait<0>();
                pin(o);
                release(shared.v_empty[v_stage.index]);
                v_stage.next();
#pragma unroll
                for (int j = 0; j < D / 2; ++j) o[j] *= correction[j / 2 % 2];
                round_weights();
            }
            release(shared.q_empty);
            clear_values_behind(keys);
            barrier_wait(shared.v_full[v_stage.index], v_stage.parity);
            issue_values(work.steps > 1);
            wgmma_wait<0>();
            pin(o);
            release(shared.v_empty[v_stage.index]);
            v_stage.next();
        } else {
#pragma unroll
            for (int i = 0; i < D / 2; ++i) o[i] = 0.f;
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            statistics.sum[row] += __shfl_xor_sync(0xFFFFFFFF, statistics.sum[row], 1);
            statistics.sum[row] += __shfl_xor_sync(0xFFFFFFFF, statistics.sum[row], 2);
        }
        if (work.parts > 1) {
            const int64_t at = int64_t(batch) * a.slot_count + work.slot;
            if (!merge_parts<D>(o, statistics, a, work, at, group, shared.arrived[group])) continue;
        }
        float factor[2];
        const int row = group * 64 + thread / 32 * 16 + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = statistics.sum[half];
            factor[half] = sum == 0.f ? 0.f : 1.f / sum;  // a NaN among the visible keys must show
            if (lane % 4 == 0 && row + half * 8 < work.q_length) {
                a.lse[(int64_t(batch) * a.heads + work.head) * a.length + work.q_start + row + half * 8] =
                    sum == 0.f ? -INFINITY : statistics.maximum[half] * a.scale + logf(sum);
            }
        }
        const int64_t row_stride = int64_t(a.heads) * D;
        T* out = static_cast<T*>(a.out) + (int64_t(batch) * a.length + work.q_start) * row_stride + work.head * D;
        store_rows<T, D>(o, out, row_stride, row, work.q_length, factor);
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(384, 1)
    forward_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                   const __grid_constant__ CUtensorMap map_v, const __grid_constant__ ForwardArguments a) {
    using Tile = ForwardTile<D>;
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& shared = *reinterpret_cast<typename Tile::Shared*>(memory);
    if (threadIdx.x == 0) {
        prefetch_map(&map_q);
        prefetch_map(&map_k);
        prefetch_map(&map_v);
        barrier_init(shared.q_full, 1);
        barrier_init(shared.q_empty, 8);
        for (int i = 0; i < Tile::STAGES; ++i) {
            barrier_init(shared.k_full[i], 1);
            barrier_init(shared.k_empty[i], 8);
            barrier_init(shared.v_full[i], 1);
            barrier_init(shared.v_empty[i], 8);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(shared.work_full[i], 1);
            barrier_init(shared.work_empty[i], 8);
        }
        fence_barrier_init();
    }
    __syncthreads();
    const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
    if (warpgroup == 0) {
        give_registers<40>();
        if (threadIdx.x == 0) produce_forward<D>(shared, map_q, map_k, map_v, a);
    } else {
        take_registers<232>();
        consume_forward<T, D>(shared, a, warpgroup - 1);
    }
}

struct ForwardTensors {
    const void *q, *k, *v;
    Strides q_strides, k_strides, v_strides;
    int64_t keys;
    int sms;
};

template <typename T, int D>
cudaError_t launch_forward(const ForwardTensors& x, const ForwardArguments& a, cudaStream_t stream) {
    using Tile = ForwardTile<D>;
    constexpr auto type =
        std::is_same_v<T, __nv_bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    CUtensorMap q, k, v;
    cudaError_t status = make_tensor_map(&q, type, x.q, a.batch, a.length, a.heads, D, x.q_strides, Tile::ROWS);
    if (status != cudaSuccess) return status;
    const int heads = a.heads / a.group;
    status = make_tensor_map(&k, type, x.k, a.batch, x.keys, heads, D, x.k_strides, Tile::KEYS);
    if (status != cudaSuccess) return status;
    status = make_tensor_map(&v, type, x.v, a.batch, x.keys, heads, D, x.v_strides, Tile::KEYS);
    if (status != cudaSuccess) return status;
    const auto kernel = forward_kernel<T, D>;
    constexpr int bytes = sizeof(typename Tile::Shared);
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    const int blocks = int(std::min<int64_t>(x.sms, int64_t(a.work_count) * a.batch));
    kernel<<<blocks, Tile::THREADS, bytes, stream>>>(q, k, v, a);
    return cudaGetLastError();
}

}  // namespace raven
