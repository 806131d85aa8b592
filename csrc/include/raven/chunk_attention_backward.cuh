// Backward of chunk_attention on Hopper: gradients of keys and values stay in the registers of the block that owns the
// key tile, gradients of queries are added in float32 to an accumulator in global memory. Scores are held transposed,
// [keys x queries], so that weights and their gradients feed the products from registers.
//
// Of one block, warpgroup 0 copies and adds (one thread each), warpgroups 1 and 2 own 64 keys each.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "hopper.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace raven {

struct BackwardArguments {
  const int2* items;       // key tile, kv head + kv heads * sample; the most expensive first
  const int4* key_tiles;   // first key, keys, run of keys, number of the tile in its run
  const int* visit_indptr; // of the runs of keys
  const int4* visits;      // first query, queries, first query tile, key tiles of earlier runs that visit these queries
  const float* rows;       // [B, H, tiles, 2, QUERIES]: log-sum-exp in base 2, then delta
  float* dq;               // [B, H, tiles, D * QUERIES], in the order that the consumers' registers hold
  int* next_item;          // zero
  int* turns;              // [B, H, tiles, 2] zeros: blocks add in the order of the items; null: in any order
  void *dk, *dv;           // [B, Lk, Hkv, D]
  int item_count, tiles, heads, group;
  int64_t keys;
  float scale;
};

constexpr int LAST_VISIT = 1 << 30;  // beside the turn of a visit

template <int D, int QUERIES_, int SCHEDULE_, bool EARLY_, bool DIRECT_>
struct BackwardTile {
  static constexpr int QUERIES = QUERIES_, SCHEDULE = SCHEDULE_;
  static constexpr bool EARLY = EARLY_, DIRECT = DIRECT_;
  static constexpr int KEYS = 128, STAGES = 2, PANELS = D / 64, THREADS = 384, INFOS = 4;
  static constexpr int DQ_COLUMNS = D == 128 ? QUERIES : QUERIES / 2;  // of a warpgroup's 64 x DQ_COLUMNS part of dQ^T
  static constexpr uint32_t Q_PANEL = QUERIES * 128, K_PANEL = KEYS * 128;
  static constexpr uint32_t ROW_BYTES = 2 * QUERIES * sizeof(float), PART_BYTES = 64 * DQ_COLUMNS * sizeof(float);

  struct Shared {
    alignas(1024) uint8_t k[PANELS * K_PANEL];
    alignas(1024) uint8_t v[PANELS * K_PANEL];
    alignas(1024) uint8_t q[STAGES][PANELS * Q_PANEL];
    alignas(1024) uint8_t g[STAGES][PANELS * Q_PANEL];
    alignas(1024) uint8_t ds[2][2 * Q_PANEL];  // [queries x 64 keys] of each warpgroup
    alignas(1024) uint8_t dq[DIRECT ? 1 : 2][DIRECT ? 128 : PART_BYTES];
    alignas(16) float rows[STAGES][2 * QUERIES];
    int4 info[INFOS];  // of the recent steps: first query, queries left in the visit, query tile or -1, turn
    int4 kept;         // parity, run of keys, number of the tile in it
    int4 item;         // first key, keys or 0, kv head, sample
    uint64_t k_full, v_full, kv_empty, q_full[STAGES], q_empty[STAGES], g_full[STAGES], g_empty[STAGES], ds_full[2];
    uint64_t dq_full[2], dq_empty[2];
  };
};

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000));
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
  }
}

template <typename Tile, int D>
__device__ __forceinline__ void produce_backward(typename Tile::Shared& shared, const CUtensorMap& map_q,
                                                 const CUtensorMap& map_k, const CUtensorMap& map_v,
                                                 const CUtensorMap& map_g, const BackwardArguments& a) {
  volatile int4& kept = shared.kept;  // what would not fit the few registers of this warpgroup
  uint32_t step = 0;
  for (kept.x = 1;; kept.x ^= 1) {
    const int next = atomicAdd(a.next_item, 1);
    barrier_wait(shared.kv_empty, kept.x);
    if (next >= a.item_count) break;
    int4 tile = a.key_tiles[a.items[next].x];
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
            copy_tile(shared_address(shared.q[at]) + panel * Tile::Q_PANEL, &map_q, shared.q_full[at], panel * 64,
                      visit.x, head, sample);
          }
          copy_bytes(shared_address(shared.rows[at]), a.rows + int64_t(visit.z) * (2 * Tile::QUERIES), shared.q_full[at],
                     Tile::ROW_BYTES);
          barrier_wait(shared.g_empty[at], before);
          barrier_expect(shared.g_full[at], sizeof(shared.g[0]));
#pragma unroll
          for (int panel = 0; panel < Tile::PANELS; ++panel) {
            copy_tile(shared_address(shared.g[at]) + panel * Tile::Q_PANEL, &map_g, shared.g_full[at], panel * 64,
                      visit.x, head, sample);
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

// Adds one warpgroup's part of each dQ tile to the accumulator.
template <typename Tile, int D>
__device__ __forceinline__ void add_queries(typename Tile::Shared& shared, const BackwardArguments& a, int part) {
#pragma unroll 1
  for (uint32_t step = 0;; ++step) {
    barrier_wait(shared.dq_full[part], step & 1);
    const int4 info = shared.info[step % Tile::INFOS];
    if (info.z < 0) break;
    const int64_t at = info.z;
    int* turn = a.turns == nullptr ? nullptr : a.turns + 2 * at + part;
    if (turn != nullptr) {
      while (load_acquire(turn) != (info.w & ~LAST_VISIT)) __nanosleep(20);
      asm volatile("fence.proxy.async.global;\n" ::: "memory");
    }
    reduce_add(a.dq + at * (D * Tile::QUERIES) + part * (Tile::PART_BYTES / 4), shared_address(shared.dq[part]),
               Tile::PART_BYTES);
    bulk_commit();
    bulk_wait_read<0>();
    barrier_arrive(shared.dq_empty[part]);
    if (turn != nullptr) {
      bulk_wait<0>();
      asm volatile("fence.proxy.async.global;\n" ::: "memory");
      add_release(turn, 1);
    }
  }
  bulk_wait<0>();
}

// Row r of 16-byte pieces spread over a quad becomes one 16-byte word a thread: thread t gets word t of all four.
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
  named_sync(1, 256);
}

__device__ __forceinline__ void arrive_warp(uint64_t& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

template <typename T, typename Tile, int D>
__device__ __forceinline__ void consume_backward(typename Tile::Shared& shared, const BackwardArguments& a, int group) {
  constexpr int QUERIES = Tile::QUERIES;
  using Scores = Wgmma<T, QUERIES>;
  using Keys = Wgmma<T, D>;
  using Queries = Wgmma<T, Tile::DQ_COLUMNS>;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = thread / 32;
  const float scale_log2 = a.scale * 1.4426950408889634f;

  float dk[D / 2], dv[D / 2], s[QUERIES / 2], dp[QUERIES / 2];
  float(&dq)[Tile::DQ_COLUMNS / 2] = reinterpret_cast<float(&)[Tile::DQ_COLUMNS / 2]>(dp);  // never both
  uint32_t p16[QUERIES / 16][4], ds16[QUERIES / 16][4];

  const uint64_t k_rows = descriptor_k_major(shared_address(shared.k) + group * 64 * 128);
  const uint64_t v_rows = descriptor_k_major(shared_address(shared.v) + group * 64 * 128);
  const uint64_t k_columns = descriptor_mn_major(shared_address(shared.k) + (D == 128 ? group * Tile::K_PANEL : 0), 0);
  // Where a lane's rows of the transposed store of dS go; a pair of 8-query blocks is 2,048 bytes further.
  const uint32_t ds_lane = (lane / 16 * 8 + lane % 8) * 128 + (((2 * warp + lane / 8 % 2) ^ (lane % 8)) * 16);

  const auto issue_scores = [&](int stage) {
    const uint64_t b = descriptor_k_major(shared_address(shared.q[stage]));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      Scores::template ss<false, false>(s, advance(k_rows, i / 4 * Tile::K_PANEL + i % 4 * 32),
                                        advance(b, i / 4 * Tile::Q_PANEL + i % 4 * 32), i > 0);
    }
    wgmma_commit();
  };
  const auto issue_weight_gradients = [&](int stage) {
    const uint64_t b = descriptor_k_major(shared_address(shared.g[stage]));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      Scores::template ss<false, false>(dp, advance(v_rows, i / 4 * Tile::K_PANEL + i % 4 * 32),
                                        advance(b, i / 4 * Tile::Q_PANEL + i % 4 * 32), i > 0);
    }
    wgmma_commit();
  };
  const auto issue_rows = [&](float(&d)[D / 2], uint32_t(&x)[QUERIES / 16][4], uint8_t* tile) {
    const uint64_t b = descriptor_mn_major(shared_address(tile), Tile::Q_PANEL);
#pragma unroll
    for (int i = 0; i < QUERIES / 16; ++i) Keys::template rs<true>(d, x[i], advance(b, i * 2048), 1);
  };
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
  const auto round_weights = [&] {
#pragma unroll
    for (int i = 0; i < QUERIES / 4; ++i) p16[i / 4][i % 4] = pack_pair<T>(s[2 * i], s[2 * i + 1]);
  };

  uint32_t step = 0, parity = 0;
  float* direct = nullptr;
  // The part of dQ^T of step `number` to where it is added from.
  const auto stage_queries = [&](uint32_t number) {
    if constexpr (Tile::DIRECT) {
#pragma unroll
      for (int i = 0; i < Tile::DQ_COLUMNS / 8; ++i) {
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(direct + i * 512), "f"(dq[4 * i]),
                     "f"(dq[4 * i + 1]), "f"(dq[4 * i + 2]), "f"(dq[4 * i + 3])
                     : "memory");
      }
    } else {
      barrier_wait(shared.dq_empty[group], (number & 1) ^ 1);
#pragma unroll
      for (int i = 0; i < Tile::DQ_COLUMNS / 8; ++i) {
        *reinterpret_cast<float4*>(shared.dq[group] + (i * 128 + thread) * 16) =
            make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
      }
      fence_async_proxy();
      arrive_warp(shared.dq_full[group]);
    }
  };

  while (true) {
    barrier_wait(shared.k_full, parity);
    const int keys = shared.item.y;
    if (keys == 0) break;
    if (keys < Tile::KEYS) clear_rows<Tile::PANELS, Tile::KEYS>(shared.k, keys);
    const int row = group * 64 + warp * 16 + lane / 4;
    // Weights of absent keys: S is 0 there, which is not a weight of 0.
    const uint32_t keep_low = row < keys ? 0xFFFFFFFF : 0, keep_high = row + 8 < keys ? 0xFFFFFFFF : 0;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0.f;

    int queries;  // left in the visit
    const auto start_scores = [&] {
      const uint32_t at = step & 1;
      barrier_wait(shared.q_full[at], step >> 1 & 1);
      queries = shared.info[step % Tile::INFOS].y;
      if (queries < QUERIES) clear_rows<Tile::PANELS, QUERIES>(shared.q[at], queries);
      issue_scores(at);
    };
    const auto start_weight_gradients = [&] {
      const uint32_t at = step & 1;
      barrier_wait(shared.g_full[at], step >> 1 & 1);
      if (queries < QUERIES) clear_rows<Tile::PANELS, QUERIES>(shared.g[at], queries);
      issue_weight_gradients(at);
      if constexpr (Tile::DIRECT) {
        direct = a.dq + int64_t(shared.info[step % Tile::INFOS].z) * (D * QUERIES) + group * (Tile::PART_BYTES / 4) + thread * 4;
      }
    };
    const auto release = [&](uint32_t used) {
      pin(dk);
      pin(dv);
#pragma unroll
      for (int i = 0; i < QUERIES / 4; ++i) asm volatile("" ::"r"(p16[i / 4][i % 4]), "r"(ds16[i / 4][i % 4]));
      arrive_warp(shared.q_empty[used]);
      arrive_warp(shared.g_empty[used]);
    };

    start_scores();
    barrier_wait(shared.v_full, parity);
    if (keys < Tile::KEYS) clear_rows<Tile::PANELS, Tile::KEYS>(shared.v, keys);
    parity ^= 1;
    if constexpr (Tile::SCHEDULE == 1) {
      wgmma_wait<0>();
      pin(s);
      weigh(shared.rows[step & 1], 0, QUERIES / 16);
    }
    start_weight_gradients();

    uint32_t used;
    while (true) {
      used = step & 1;
      const float* rows = shared.rows[used];
      if constexpr (Tile::SCHEDULE == 0) {  // under way: the scores, then the gradients of the weights
        wgmma_wait<1>();
        pin(s);
        weigh(rows, 0, QUERIES / 8);
      } else {
        weigh(rows, QUERIES / 16, QUERIES / 8);
      }
      if constexpr (Tile::EARLY) {
        round_weights();
        wgmma_fence();
        issue_rows(dv, p16, shared.g[used]);
        wgmma_commit();
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      pin(dp);
      const uint32_t ds_at = shared_address(shared.ds[used]) + group * Tile::Q_PANEL + ds_lane;
#pragma unroll
      for (int j = 0; j < QUERIES / 16; ++j) {
        const float2 x = *reinterpret_cast<const float2*>(rows + QUERIES + 16 * j + lane % 4 * 2);
        const float2 y = *reinterpret_cast<const float2*>(rows + QUERIES + 16 * j + 8 + lane % 4 * 2);
        const float delta[4] = {x.x, x.y, y.x, y.y};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = 8 * j + 2 * i;
          if constexpr (!Tile::EARLY) p16[j][i] = pack_pair<T>(s[at], s[at + 1]);
          float2 weight = make_float2(s[at], s[at + 1]);
          if constexpr (Tile::EARLY) weight = unpack_pair<T>(p16[j][i]);
          ds16[j][i] = pack_pair<T>(weight.x * (dp[at] - delta[i / 2 * 2]), weight.y * (dp[at + 1] - delta[i / 2 * 2 + 1]));
        }
        if (keys < Tile::KEYS) {
          ds16[j][0] &= keep_low;
          ds16[j][1] &= keep_high;
          ds16[j][2] &= keep_low;
          ds16[j][3] &= keep_high;
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(ds_at + j * 2048),
                     "r"(ds16[j][0]), "r"(ds16[j][1]), "r"(ds16[j][2]), "r"(ds16[j][3])
                     : "memory");
      }
      fence_async_proxy();
      arrive_warp(shared.ds_full[used]);
      wgmma_fence();
      if constexpr (!Tile::EARLY) issue_rows(dv, p16, shared.g[used]);
      issue_rows(dk, ds16, shared.q[used]);
      wgmma_commit();

      const bool end = queries <= QUERIES && shared.info[step % Tile::INFOS].w & LAST_VISIT;
      ++step;
      if (end) break;
      if constexpr (Tile::SCHEDULE == 0) {
        barrier_wait(shared.ds_full[used], (step - 1) >> 1 & 1);
        issue_queries(used);
        wgmma_wait<1>();
        release(used);
        start_scores();
        wgmma_wait<1>();
        pin(dq);
      } else {
        start_scores();
        wgmma_wait<1>();
        release(used);
        barrier_wait(shared.ds_full[used], (step - 1) >> 1 & 1);
        issue_queries(used);
        wgmma_wait<1>();
        pin(s);
        weigh(shared.rows[step & 1], 0, QUERIES / 16);
        wgmma_wait<0>();
        pin(dq);
      }
      stage_queries(step - 1);
      start_weight_gradients();
    }
    wgmma_wait<0>();
    release(used);
    barrier_wait(shared.ds_full[used], (step - 1) >> 1 & 1);
    issue_queries(used);
    wgmma_wait<0>();
    pin(dq);
    stage_queries(step - 1);
    const int4 item = shared.item;
    arrive_warp(shared.kv_empty);
    const int64_t row_stride = int64_t(a.heads / a.group) * D;
    const int64_t at = (int64_t(item.w) * a.keys + item.x + group * 64) * row_stride + item.z * D;
    store_gradient<T, D>(dv, static_cast<T*>(a.dv) + at, row_stride, item.y - group * 64, 1.f);
    store_gradient<T, D>(dk, static_cast<T*>(a.dk) + at, row_stride, item.y - group * 64, a.scale);
  }
  if constexpr (!Tile::DIRECT) {
    barrier_wait(shared.dq_empty[group], (step & 1) ^ 1);
    arrive_warp(shared.dq_full[group]);
  }
}

template <typename T, typename Tile, int D>
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
    barrier_init(shared.kv_empty, 8);
    for (int i = 0; i < Tile::STAGES; ++i) {
      barrier_init(shared.q_full[i], 1);
      barrier_init(shared.q_empty[i], 8);
      barrier_init(shared.g_full[i], 1);
      barrier_init(shared.g_empty[i], 8);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.ds_full[i], 8);
      barrier_init(shared.dq_full[i], 4);
      barrier_init(shared.dq_empty[i], 1);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    give_registers<24>();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 != 0) return;
    if (warp == 0) produce_backward<Tile, D>(shared, map_q, map_k, map_v, map_g, a);
    if (!Tile::DIRECT && (warp == 1 || warp == 2)) add_queries<Tile, D>(shared, a, warp - 1);
  } else {
    take_registers<240>();
    consume_backward<T, Tile, D>(shared, a, warpgroup - 1);
  }
}

struct BackwardTensors {
  const void *q, *k, *v, *g;
  Strides q_strides, k_strides, v_strides, g_strides;
  int64_t batch, queries;
  int sms;
};

template <typename T, typename Tile, int D>
cudaError_t launch_backward(const BackwardTensors& x, const BackwardArguments& a, cudaStream_t stream) {
  constexpr auto type =
      std::is_same_v<T, __nv_bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
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
  const auto kernel = backward_kernel<T, Tile, D>;
  constexpr int bytes = sizeof(typename Tile::Shared);
  static_assert(bytes <= 232448, "shared memory of an SM");
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  kernel<<<std::min(x.sms, a.item_count), Tile::THREADS, bytes, stream>>>(q, k, v, g, a);
  return cudaGetLastError();
}

}  // namespace raven
