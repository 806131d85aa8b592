// RMS norm and 3-D rotary positions of queries and keys, and the write of keys and values into a cache.
//
// A team of 1 to 8 warps takes every T-th token, q, k and v of it together: one set of angles and one exchange between
// warps serve both. Rows come into each lane's own shared memory by asynchronous copies, one token ahead, so that they
// cost no registers and need no barrier. One block for each multiprocessor, with as many warps as share the tokens
// evenly. Channels lie along the lanes, eight each, and the heads of a team's stride are whole: a lane meets the same
// four pairs in every head, so it forms four angles a token and no more.
#pragma once

#include <cstdint>

#include "memory.cuh"
#include "rotary.cuh"

namespace raven {

constexpr int kMostWarps = 16;
constexpr int kMostRowEights = 1024;                     // of a row: 8,192 channels
constexpr size_t kSharedBytes = 227 * 1024;              // of a block, sm_90
constexpr size_t kStaticBytes = 2048;                    // of them for frequencies and sums, and room to align
constexpr float kE4m3Max = 448.0f;
constexpr float kSmallestAmax = 5.421010862427522e-20f;  // 2^-64: below it the scale stays, so 448 / amax is finite

// A weight [H * D], or [D] per head; null: no norm.
struct Weight {
    const void* data;
    Dtype dtype;
};

// What is known when compiled: the eights of a row that a lane holds, and the warps of a team. Full: every lane has that
// many, in q and in k, and both have one norm over the whole row.
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

template <typename T, typename Stored>
struct RowJob {
    Rows<const T> q, k, v;  // [B, L, heads, D]; v null: q and k only
    Rows<T> q_out;
    Rows<Stored> k_out, v_out;     // row `slots[token]`, which is left out where negative; slots null: row `token`
    Rows<float> k_scale, v_scale;  // [B, S, heads] when Stored is e4m3
    Weight q_weight, k_weight;
    const int32_t* positions;  // [L, 3], or [B, L, 3] with position_batch = 3 L
    int64_t position_batch;
    const int32_t* slots;         // [L]
    const int64_t* frequencies;   // [D / 2]
    uint32_t total, length;       // B * L and L
    int q_eights, k_eights, dim;  // of a row: H * D / 8, Hk * D / 8
    float q_share, k_share;       // of one channel in the mean of squares
    bool per_head;
    float eps;
};

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

// The larger of two magnitudes; a NaN stays one.
__device__ inline float larger(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
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

// Sum of squares of the lane's eights; per head `rstd` of each.
template <typename T, typename S>
__device__ inline float sum_squares(const uint4* row, int left, bool per_head, int head_lanes, float share,
                                    float eps,                                     float (&rstd)[S::kEights]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < S::kEights; ++i) {
        rstd[i] = 0.0f;
        if (S::kFull || i * S::kStride < left) {
            float x[8];
            unpack(fetched<T>(row, i), x);
            float even = x[0] * x[0], odd = x[1] * x[1];
#pragma unroll
            for (int j = 1; j < 4; ++j) {
                even = fmaf(x[2 * j], x[2 * j], even);
                odd = fmaf(x[2 * j + 1], x[2 * j + 1], odd);
            }
            rstd[i] = even + odd;
        }
        sum += rstd[i];
    }
    if (per_head) {
#pragma unroll
        for (int i = 0; i < S::kEights; ++i)
            rstd[i] = rsqrtf(sum_lanes(rstd[i], head_lanes) * share + eps);
    }
    return sum;
}

// Write eight channels of a row, as they are or in e4m3 with the scale of their head.
template <typename Stored>
__device__ inline void store_channels(Stored* p, float*, const float (&x)[8], bool present, int) {
    if (present) store(p, pack<Stored>(x));
}

__device__ inline void store_channels(__nv_fp8_e4m3* p, float* scale, const float (&x)[8], bool present,
                                      int head_lanes) {
    float amax = fabsf(x[0]);
#pragma unroll
    for (int j = 1; j < 8; ++j) amax = larger(amax, fabsf(x[j]));
    for (int step = head_lanes / 2; step > 0; step /= 2) amax = larger(amax, __shfl_xor_sync(0xffffffffu, amax, step));
    if (amax < kSmallestAmax) amax = kSmallestAmax;
    if (present) {
        *reinterpret_cast<uint2*>(p) = pack_e4m3(x, kE4m3Max / amax);
        if ((threadIdx.x & (head_lanes - 1)) == 0) *scale = amax / kE4m3Max;
    }
}

// Norm, rotate and write one row. cos and sin have the norm's factor in them, except per head.
template <typename T, typename Stored, typename S>
__device__ inline void finish_row(const uint4* row, const WeightView<S>& weight, const float (&cos)[4], const float (&sin)[4],
                                  bool per_head, const float (&rstd)[S::kEights], Stored* out, float* scale, int left,
                                  int head_lanes, int head_shift) {
#pragma unroll
    for (int i = 0; i < S::kEights; ++i) {
        const bool present = S::kFull || i * S::kStride < left;
        float x[8];
        unpack(fetched<T>(row, i), x);
        if (S::kFull || (weight.data != nullptr && present)) {
            float w[8];
            weight.template read<true>(i, w);
#pragma unroll
            for (int j = 0; j < 8; ++j) x[j] *= w[j];
            if (per_head) {
#pragma unroll
                for (int j = 0; j < 8; ++j) x[j] *= rstd[i];
            }
        }
        rotate(x, cos, sin);
        store_channels(out + i * S::kStride * 8, scale + (i * S::kStride >> head_shift), x, present, head_lanes);
        // Nothing of the next eights is read before: otherwise the compiler reads all of them first, and spills.
        if (i % 2 == 1) __syncwarp();
    }
}

template <typename T, typename Stored, typename S>
__global__ void __launch_bounds__(32 * kMostWarps, 1) norm_rope_rows(const __grid_constant__ RowJob<T, Stored> job) {
    constexpr int kRow = kRowBytes<T, S>;
    extern __shared__ float4 shared[];
    __shared__ float2 cells[2][kMostWarps];
    __shared__ uint64_t frequencies[kMostPairs];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = 32 * (warp % S::kTeam) + lane;
    const bool append = job.v.data != nullptr;
    const bool per_head = !S::kFull && job.per_head;
    const int head_lanes = job.dim / 8, head_shift = 31 - __clz(head_lanes);
    const int q_left = job.q_eights - first, k_left = job.k_eights - first;
    // A warp's stages: rows of q, k and v, each [eight][part][lane].
    const int stage_bytes = (append ? 3 : 2) * kRow;
    auto* const mine = reinterpret_cast<unsigned char*>(shared) + warp * kStages<T> * stage_bytes + 16 * lane;
    auto* const weights = reinterpret_cast<float4*>(reinterpret_cast<unsigned char*>(shared) +
                                                    blockDim.x / 32 * kStages<T> * stage_bytes);

    wait_for_previous();
    // Neighbouring teams take neighbouring tokens: what the whole GPU works on lies close together in memory.
    const uint32_t teams = blockDim.x / (32 * S::kTeam), step = gridDim.x * teams;
    uint32_t n = blockIdx.x * teams + warp / S::kTeam;
    // What comes next: its batch entry, position, and row in the caches.
    uint32_t next_batch = 0, next_token = 0;
    Position next_position{};
    int32_t next_row = 0;
    const auto fetch = [&](uint32_t next, uint32_t stage) {
        const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(mine)) + stage * stage_bytes;
        next_batch = job.total == job.length ? 0 : next / job.length;
        next_token = next - next_batch * job.length;
        fetch_row<T, S>(to, job.q.row(next_batch, next_token) + 8 * first, q_left);
        fetch_row<T, S>(to + kRow, job.k.row(next_batch, next_token) + 8 * first, k_left);
        if (append) fetch_row<T, S>(to + 2 * kRow, job.v.row(next_batch, next_token) + 8 * first, k_left);
        next_position = load_position(job.positions + next_batch * job.position_batch + 3ll * next_token);
        next_row = job.slots == nullptr ? static_cast<int32_t>(next_token) : job.slots[next_token];
    };

    if (n < job.total) fetch(n, 0);
    copies_commit();
    const StagedWeight q_staged{job.q_weight, per_head ? head_lanes : job.q_eights, weights};
    const StagedWeight k_staged{job.k_weight, per_head ? head_lanes : job.k_eights, q_staged.end()};
    stage_weights(q_staged, k_staged);
    const WeightView<S> q_weight(q_staged.shared, job.q_weight, job.q_eights, first, head_lanes, per_head);
    const WeightView<S> k_weight(k_staged.shared, job.k_weight, job.k_eights, first, head_lanes, per_head);
    const bool has_q = S::kFull || q_weight.data != nullptr, has_k = S::kFull || k_weight.data != nullptr;
    stage_frequencies(frequencies, job.frequencies, job.dim);
    const FourPairs pairs(frequencies, lane % head_lanes * 4, job.dim);
    __syncthreads();

    for (uint32_t parity = 0; n < job.total; n += step, parity ^= 1) {
        const uint32_t b = next_batch;
        const int64_t token = next_token, row = next_row;
        float cos[4], sin[4];
        pairs.at<sizeof(T) == 2>(next_position, cos, sin);
        if (kStages<T> == 2) {
            if (n + step < job.total) fetch(n + step, parity ^ 1);
            copies_commit();
        }
        copies_wait<kStages<T> - 1>();
        const auto* q = reinterpret_cast<const uint4*>(mine + (kStages<T> == 2 ? parity * stage_bytes : 0));
        const auto* k = q + kRow / 16;

        float q_rstd[S::kEights], k_rstd[S::kEights];
        float2 sums = make_float2(0.0f, 0.0f);
        if (has_q) sums.x = sum_squares<T, S>(q, q_left, per_head, head_lanes, job.q_share, job.eps, q_rstd);
        if (has_k) sums.y = sum_squares<T, S>(k, k_left, per_head, head_lanes, job.k_share, job.eps, k_rstd);
        // One factor for a row: scaling the few cosines is cheaper than scaling the row.
        float q_factor = 1.0f, k_factor = 1.0f;
        if (!per_head && (has_q || has_k)) {
            sums = sum_team<S::kTeam>(sums, cells, warp, parity);
            if (has_q) q_factor = rsqrtf(sums.x * job.q_share + job.eps);
            if (has_k) k_factor = rsqrtf(sums.y * job.k_share + job.eps);
        }
        float c[4], s[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) c[i] = cos[i] * q_factor, s[i] = sin[i] * q_factor;
        finish_row<T, T, S>(q, q_weight, c, s, per_head, q_rstd, job.q_out.row(b, token) + 8 * first, nullptr, q_left,
                            head_lanes, head_shift);
        if (row >= 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) c[i] = cos[i] * k_factor, s[i] = sin[i] * k_factor;
            float* scale = sizeof(Stored) == 1 ? job.k_scale.row(b, row) + (first >> head_shift) : nullptr;
            finish_row<T, Stored, S>(k, k_weight, c, s, per_head, k_rstd, job.k_out.row(b, row) + 8 * first, scale,
                                     k_left, head_lanes, head_shift);
        }
        if (append && row >= 0) {
            const auto* v = k + kRow / 16;
            Stored* out = job.v_out.row(b, row) + 8 * first;
            float* scale = sizeof(Stored) == 1 ? job.v_scale.row(b, row) + (first >> head_shift) : nullptr;
#pragma unroll
            for (int i = 0; i < S::kEights; ++i) {
                const bool present = S::kFull || i * S::kStride < k_left;
                if constexpr (sizeof(Stored) == sizeof(T)) {
                    if (present) store(out + i * S::kStride * 8, fetched<T>(v, i));
                } else {
                    float x[8];
                    unpack(fetched<T>(v, i), x);
                    store_channels(out + i * S::kStride * 8, scale + (i * S::kStride >> head_shift), x, present,
                                   head_lanes);
                }
            }
        }
        if (kStages<T> == 1 && n + step < job.total) {
            fetch(n + step, 0);
            copies_commit();
        }
    }
}

inline size_t weight_bytes(const Weight& weight, int eights, int dim, bool per_head) {
    return weight.data == nullptr ? 0 : static_cast<size_t>(per_head ? dim / 8 : eights) * 32;
}

inline cudaError_t multiprocessors(int& count) {
    int device = 0;
    const auto status = cudaGetDevice(&device);
    return status != cudaSuccess ? status : cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

// Warps of each of `blocks` blocks: no more than `most`, and no more than finish `rows` in the same number of rounds.
inline int balanced_warps(int64_t rows, int64_t blocks, int team, int most) {
    const int64_t teams = most / team;
    const int64_t rounds = (rows + blocks * teams - 1) / (blocks * teams);
    return static_cast<int>((rows + blocks * rounds - 1) / (blocks * rounds)) * team;
}

template <typename S, typename T, typename Stored>
cudaError_t launch_rows_of(const RowJob<T, Stored>& job, cudaStream_t stream) {
    int sms = 0;
    if (const auto status = multiprocessors(sms); status != cudaSuccess) return status;
    const size_t weights = weight_bytes(job.q_weight, job.q_eights, job.dim, job.per_head) +
                           weight_bytes(job.k_weight, job.k_eights, job.dim, job.per_head);
    const size_t bytes = static_cast<size_t>(kStages<T>) * (job.v.data == nullptr ? 2 : 3) * kRowBytes<T, S>;
    const auto fit = static_cast<int>((kSharedBytes - kStaticBytes - weights) / bytes);
    const int warps = balanced_warps(job.total, sms, S::kTeam, fit < kMostWarps ? fit : kMostWarps);
    const auto teams = static_cast<uint32_t>(warps / S::kTeam);
    const uint32_t needed = (job.total + teams - 1) / teams;
    const uint32_t blocks = needed < static_cast<uint32_t>(sms) ? needed : sms;
    return launch_overlapped(norm_rope_rows<T, Stored, S>, blocks, 32 * warps, weights + warps * bytes, stream, job);
}

// Calls f with the shape for rows of q_eights and k_eights, at most kMost of them in a lane. Widths of common models fit
// their shape exactly; others, and norms that are not over whole rows, take one with room to spare.
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

// Queues the job; rows are 16-byte aligned, of at most kMostRowEights eights, and total is below 2^30.
template <typename T, typename Stored>
cudaError_t launch_rows(const RowJob<T, Stored>& job, cudaStream_t stream) {
    const bool one_norm = !job.per_head && job.q_weight.data != nullptr && job.k_weight.data != nullptr;
    return with_shape<T, 6>(job.q_eights, job.k_eights, one_norm,
                         [&](auto shape) { return launch_rows_of<decltype(shape)>(job, stream); });
}

}  // namespace raven
