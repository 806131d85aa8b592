// RMS norm and 3-D rotary positions of queries and keys, and the write of keys and values into a cache.
//
// A team of 1 to 8 warps takes one row of one token, of q, k or v: few registers and no loop over tokens, so that many
// rows are on their way at once, and the last ones are soon done. Channels lie along the lanes, eight each, and the
// heads of a team's stride are whole: a lane meets the same four pairs in every head, so it forms four angles a row and
// no more. Weights come through L1, which keeps them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "memory.cuh"
#include "norm_rows.cuh"
#include "rotary.cuh"

namespace raven {

constexpr float kE4m3Max = 448.0f;
constexpr float kSmallestAmax = 5.421010862427522e-20f;  // 2^-64: below it the scale stays, so 448 / amax is finite

// One of q, k and v, and where it goes.
template <typename T>
struct RowTensor {
    Rows<const T> in;   // [B, L, heads, D]
    Rows<void> out;     // of q: row `token`; of k and v: row `slots[token]`
    Rows<float> scale;  // [B, S, heads] where the row is stored in e4m3
    Weight weight;      // of v: none
    int eights;         // of a row: heads * D / 8
    float share;        // of one channel in the mean of squares
};

template <typename T>
struct RowJob {
    RowTensor<T> tensors[3];   // q, k, v
    const int32_t* positions;  // [L, 3], or [B, L, 3] with position_batch = 3 L
    int64_t position_batch;
    const int32_t* slots;        // [L], negative: the token's k and v are left out; null: its own row
    const int64_t* frequencies;  // [D / 2]
    uint32_t total, length;      // B * L and L
    uint32_t rows;               // of a token: 2, or 3 with v
    uint32_t first_blocks;       // that are resident when the kernel starts
    int dim;
    bool per_head, rotate_keys;  // without: k is normed alone
    float eps;
};

// The larger of two magnitudes; a NaN stays one.
__device__ inline float larger(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// Brings what is at p into L1, and costs no register. Waited for as any other asynchronous copy.
__device__ inline void touch(uint32_t* shared, const void* p) {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        "l"(p)
        : "memory");
}

// The compiler forgets what it has unpacked: unpacking again is cheaper than the registers.
template <typename T>
__device__ inline void keep_packed(Eight<T>& x) {
#pragma unroll
    for (auto& part : x.part) asm volatile("" : "+r"(part.x), "+r"(part.y), "+r"(part.z), "+r"(part.w));
}

template <typename T>
__device__ inline float sum_squares(const Eight<T>& eight) {
    float x[8];
    unpack(eight, x);
    float even = x[0] * x[0], odd = x[1] * x[1];
#pragma unroll
    for (int j = 1; j < 4; ++j) {
        even = fmaf(x[2 * j], x[2 * j], even);
        odd = fmaf(x[2 * j + 1], x[2 * j + 1], odd);
    }
    return even + odd;
}

// Sum over a team, in the order of its warps.
template <int Team>
__device__ inline float sum_row(float x, float* cells, int warp) {
    x = sum_lanes(x, 32);
    if constexpr (Team > 1) {
        if (threadIdx.x % 32 == 0) cells[warp] = x;
        asm volatile("bar.sync %0, %1;" ::"r"(warp / Team + 1), "n"(32 * Team) : "memory");
        x = 0.0f;
#pragma unroll
        for (int i = 0; i < Team; ++i) x += cells[warp / Team * Team + i];
    }
    return x;
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

// Rotate and write a row of registers. cos and sin have the norm's factor in them, except per head.
template <typename S, typename W, typename T, typename Stored>
__device__ inline void finish_row(const Eight<T> (&row)[S::kEights], const W* weight, bool has_norm, bool per_head,
                                  const float (&cos)[4], const float (&sin)[4], const float (&rstd)[S::kEights],
                                  Stored* out, float* scale, int left, int head_lanes, int head_shift) {
    constexpr int N = S::kEights;
    const int step = per_head ? 0 : S::kStride * 8;
    Eight<W> next{};
    const auto fetch_weight = [&](int i) {
        if (S::kFull || (has_norm && i * S::kStride < left)) next = load(weight + i * step);
    };
    fetch_weight(0);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const Eight<W> now = next;
        if (i + 1 < N) fetch_weight(i + 1);
        float x[8];
        unpack(row[i], x);
        if (has_norm) {
            float w[8];
            unpack(now, w);
#pragma unroll
            for (int j = 0; j < 8; ++j) x[j] *= w[j];
            if (per_head) {
#pragma unroll
                for (int j = 0; j < 8; ++j) x[j] *= rstd[i];
            }
        }
        rotate(x, cos, sin);
        store_channels(out + i * S::kStride * 8, scale + (i * S::kStride >> head_shift), x,
                       S::kFull || i * S::kStride < left, head_lanes);
    }
}

// Write a row as it is, or in e4m3.
template <typename S, typename T, typename Stored>
__device__ inline void copy_row(const Eight<T> (&row)[S::kEights], Stored* out, float* scale, int left, int head_lanes,
                                int head_shift) {
#pragma unroll
    for (int i = 0; i < S::kEights; ++i) {
        const bool present = S::kFull || i * S::kStride < left;
        if constexpr (std::is_same_v<T, Stored>) {
            if (present) store(out + i * S::kStride * 8, row[i]);
        } else {
            float x[8];
            unpack(row[i], x);
            store_channels(out + i * S::kStride * 8, scale + (i * S::kStride >> head_shift), x, present, head_lanes);
        }
    }
}

// Rows of a block: so many that it has 4 warps, or 8 where warps work together.
template <typename S>
constexpr int kTeams = S::kTeam == 1 ? 4 : 8 / S::kTeam;

// Blocks on a multiprocessor for which a thread has the registers that it needs, of a row mostly.
template <typename T, typename Stored, typename S>
constexpr int kRowBlocks =
    2048 / (S::kTeam * kTeams<S> *
            (32 + 2 * S::kEights * static_cast<int>(sizeof(T)) + (S::kFull && sizeof(Stored) == sizeof(T) ? 12 : 24)));

template <typename T, typename Stored, typename S>
__global__ void __launch_bounds__(32 * S::kTeam * kTeams<S>, kRowBlocks<T, Stored, S>)
    norm_rope_rows(const __grid_constant__ RowJob<T> job) {
    constexpr int N = S::kEights;
    __shared__ float cells[S::kTeam * kTeams<S>];
    __shared__ uint32_t touched[N][32 * S::kTeam * kTeams<S>];  // written only
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = 32 * (warp % S::kTeam) + lane;
    // Neighbouring teams take the rows of one token: what the whole GPU works on lies close together in memory.
    const uint32_t team = blockIdx.x * kTeams<S> + warp / S::kTeam;
    const uint32_t n = job.rows == 2 ? team / 2 : team / 3, which = team - n * job.rows;
    wait_for_previous();
    if (n >= job.total) return;
    const uint32_t b = job.total == job.length ? 0 : n / job.length, token = n - b * job.length;
    const RowTensor<T>& t = job.tensors[which];
    const int left = t.eights - first;
    const bool has_norm = which < 2 && (S::kFull || t.weight.data != nullptr), per_head = !S::kFull && job.per_head;
    const int head_lanes = job.dim / 8, head_shift = 31 - __clz(head_lanes);

    // The first rows on a multiprocessor find no weight in L1, and would wait for one eight after the other.
    if (blockIdx.x < job.first_blocks && has_norm && !per_head) {
        const int bytes = t.weight.dtype == Dtype::kFloat32 ? 32 : 16;
        const auto* p = static_cast<const char*>(t.weight.data) + first * bytes;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (S::kFull || i * S::kStride < left) touch(&touched[i][threadIdx.x], p + i * S::kStride * bytes);
        }
        copies_commit();
    }
    const T* from = t.in.row(b, token) + 8 * first;
    Eight<T> row[N]{};
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (S::kFull || i * S::kStride < left) row[i] = load(from + i * S::kStride * 8);
    }
    int64_t to = token;
    if (which != 0 && job.slots != nullptr) to = job.slots[token];

    float cos[4], sin[4], rstd[N];
    if (which < 2) {
        const FourPairs pairs(reinterpret_cast<const uint64_t*>(job.frequencies), lane % head_lanes * 4, job.dim);
        const bool turned = which == 0 || job.rotate_keys;
        const auto place = turned ? load_position(job.positions + b * job.position_batch + 3ll * token) : Position{};
        pairs.at<sizeof(T) == 2>(place, cos, sin);
    }
    if (has_norm) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            rstd[i] = S::kFull || i * S::kStride < left ? sum_squares(row[i]) : 0.0f;
            sum += rstd[i];
        }
        if (per_head) {
#pragma unroll
            for (int i = 0; i < N; ++i) rstd[i] = rsqrtf(sum_lanes(rstd[i], head_lanes) * t.share + job.eps);
        } else {
            // One factor for a row: scaling the few cosines is cheaper than scaling the row.
            const float factor = rsqrtf(sum_row<S::kTeam>(sum, cells, warp) * t.share + job.eps);
#pragma unroll
            for (int i = 0; i < 4; ++i) cos[i] *= factor, sin[i] *= factor;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) keep_packed(row[i]);
    }
    copies_wait<0>();
    if (to < 0) return;

    const auto write = [&](auto* out) {  // its type alone matters
        using Out = std::remove_pointer_t<decltype(out)>;
        out = static_cast<Out*>(t.out.data) + b * t.out.batch + to * t.out.token + 8 * first;
        float* scale = sizeof(Out) == 1 ? t.scale.row(b, to) + (first >> head_shift) : nullptr;
        if (which == 2) {
            return copy_row<S>(row, out, scale, left, head_lanes, head_shift);
        }
        const auto finish = [&](const auto* weight) {
            finish_row<S>(row, weight + 8 * (per_head ? first % head_lanes : first), has_norm, per_head, cos, sin, rstd,
                          out, scale, left, head_lanes, head_shift);
        };
        switch (t.weight.dtype) {
            case Dtype::kFloat16:
                return finish(static_cast<const __half*>(t.weight.data));
            case Dtype::kBFloat16:
                return finish(static_cast<const __nv_bfloat16*>(t.weight.data));
            default:
                return finish(static_cast<const float*>(t.weight.data));
        }
    };
    if (!std::is_same_v<T, Stored> && which == 0) {
        write(static_cast<T*>(nullptr));
    } else {
        write(static_cast<Stored*>(nullptr));
    }
}

template <typename Stored, typename S, typename T>
cudaError_t launch_rows_of(RowJob<T> job, cudaStream_t stream) {
    int sms = 0;
    if (const auto status = multiprocessors(sms); status != cudaSuccess) return status;
    job.first_blocks = sms * kRowBlocks<T, Stored, S>;
    const unsigned blocks =
        static_cast<unsigned>((static_cast<uint64_t>(job.total) * job.rows + kTeams<S> - 1) / kTeams<S>);
    return launch_overlapped(norm_rope_rows<T, Stored, S>, blocks, 32 * S::kTeam * kTeams<S>, 0, stream, job);
}

// Queues the job; rows are 16-byte aligned, of at most kMostRowEights eights, and total is below 2^30.
template <typename Stored, typename T>
cudaError_t launch_rows(const RowJob<T>& job, cudaStream_t stream) {
    const auto &q = job.tensors[0], &k = job.tensors[1];
    const bool one_norm = !job.per_head && q.weight.data != nullptr && k.weight.data != nullptr;
    return with_shape<T, 6>(q.eights, k.eights, one_norm,
                            [&](auto shape) { return launch_rows_of<Stored, decltype(shape)>(job, stream); });
}

}  // namespace raven
