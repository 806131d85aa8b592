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
#include "norm_rows.cuh"
#include "rotary.cuh"

namespace raven {

constexpr float kE4m3Max = 448.0f;
constexpr float kSmallestAmax = 5.421010862427522e-20f;  // 2^-64: below it the scale stays, so 448 / amax is finite

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

// The larger of two magnitudes; a NaN stays one.
__device__ inline float larger(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// Sum of squares of the lane's eights; per head `rstd` of each.
template <typename T, typename S>
__device__ inline float sum_squares(const uint4* row, int left, bool per_head, int head_lanes, float share, float eps,
                                    float (&rstd)[S::kEights]) {
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
        for (int i = 0; i < S::kEights; ++i) rstd[i] = rsqrtf(sum_lanes(rstd[i], head_lanes) * share + eps);
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
__device__ inline void finish_row(const uint4* row, const WeightView<S>& weight, const float (&cos)[4],
                                  const float (&sin)[4], bool per_head, const float (&rstd)[S::kEights], Stored* out,
                                  float* scale, int left, int head_lanes, int head_shift) {
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

// Queues the job; rows are 16-byte aligned, of at most kMostRowEights eights, and total is below 2^30.
template <typename T, typename Stored>
cudaError_t launch_rows(const RowJob<T, Stored>& job, cudaStream_t stream) {
    const bool one_norm = !job.per_head && job.q_weight.data != nullptr && job.k_weight.data != nullptr;
    // Scales take work: two warps a token, so that more warps have room for their rows. The others share one shape, and
    // kv_append gives the bits of qk_norm_rope.
    if constexpr (sizeof(T) == 2 && sizeof(Stored) == 1) {
        if (one_norm && job.q_eights == 192 && job.k_eights == 192)
            return launch_rows_of<Shape<3, 2, true>>(job, stream);
    }
    return with_shape<T, 6>(job.q_eights, job.k_eights, one_norm,
                            [&](auto shape) { return launch_rows_of<decltype(shape)>(job, stream); });
}

}  // namespace raven
