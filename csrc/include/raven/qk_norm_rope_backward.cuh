// Gradients of qk_norm_rope in q, k and both weights, in two launches.
//
// A team of warps takes every T-th row of one tensor, copied one row ahead as in the forward; both sums of a row (x^2,
// and the gradient along x) are taken in one go. A lane keeps the same channels in every row, so its share of the
// weight's gradient stays in registers until the end, when a block adds up its teams in order and writes one partial
// row. The second launch adds those rows, in order.
#pragma once

#include <cstdint>

#include "memory.cuh"
#include "norm_rows.cuh"
#include "rotary.cuh"

namespace raven {

template <typename T>
struct GradTensor {
    Rows<const T> x, grad;  // [B, L, heads, D]
    Rows<T> dx;
    Weight weight;
    float* partial;  // [blocks, H * D], or [blocks, D] per head; null: no gradient of the weight
    int eights;      // H * D / 8
    int blocks;      // of the grid that take this tensor
    float share;     // of one channel in the mean of squares
};

template <typename T>
struct GradJob {
    GradTensor<T> q, k;
    const int32_t* positions;
    int64_t position_batch;
    const int64_t* frequencies;
    uint32_t total, length;
    int dim;
    bool per_head;
    float eps;
};

// Of a block: fewer rows on their way at once than in the forward, and registers for the sums.
constexpr int kMostGradWarps = 12;

template <typename T, typename S>
__global__ void __launch_bounds__(32 * kMostGradWarps, 1) norm_rope_backward(const __grid_constant__ GradJob<T> job) {
    constexpr int kRow = kRowBytes<T, S>;
    constexpr int N = S::kEights;
    extern __shared__ float4 shared[];
    __shared__ float2 cells[2][kMostWarps];
    __shared__ uint64_t frequencies[kMostPairs];
    static_assert(sizeof(cells) + sizeof(frequencies) <= kStaticBytes);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = 32 * (warp % S::kTeam) + lane;
    const int teams = blockDim.x / (32 * S::kTeam), team = warp / S::kTeam;
    const int head_lanes = job.dim / 8;
    const bool is_query = blockIdx.x < job.q.blocks;
    const GradTensor<T>& t = is_query ? job.q : job.k;
    const uint32_t block = is_query ? blockIdx.x : blockIdx.x - job.q.blocks;
    const uint32_t step = t.blocks * teams;
    const int left = t.eights - first;
    const bool has_norm = S::kFull || t.weight.data != nullptr;
    const bool per_head = !S::kFull && job.per_head;
    // A warp's stages: the row and its gradient, each [eight][part][lane].
    auto* const mine = reinterpret_cast<unsigned char*>(shared) + warp * kStages<T> * 2 * kRow + 16 * lane;
    auto* const weights =
        reinterpret_cast<float4*>(reinterpret_cast<unsigned char*>(shared) + blockDim.x / 32 * kStages<T> * 2 * kRow);

    wait_for_previous();
    const auto batch_of = [&](uint32_t n) { return job.total == job.length ? 0u : n / job.length; };
    const auto fetch = [&](uint32_t n, uint32_t stage) {
        if (n < job.total) {
            const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(mine)) + stage * 2 * kRow;
            const uint32_t b = batch_of(n);
            const uint32_t token = n - b * job.length;
            if (has_norm) fetch_row<T, S>(to, t.x.row(b, token) + 8 * first, left);
            fetch_row<T, S>(to + kRow, t.grad.row(b, token) + 8 * first, left);
        }
        copies_commit();
    };
    const auto position_of = [&](uint32_t n) {
        const uint32_t b = batch_of(n);
        return load_position(job.positions + b * job.position_batch + 3ll * (n - b * job.length));
    };

    uint32_t n = block * teams + team;
    uint32_t parity = 0;  // of the round
    fetch(n, 0);
    Position position{};
    if (n < job.total) position = position_of(n);
    const StagedWeight staged{t.weight, per_head ? head_lanes : t.eights, weights};
    stage_weights(staged, {Weight{}, 0, nullptr});
    const WeightView<S> weight(weights, t.weight, t.eights, first, head_lanes, per_head);
    stage_frequencies(frequencies, job.frequencies, job.dim);
    const FourPairs pairs(frequencies, lane % head_lanes * 4, job.dim);
    float sums[N][8] = {};
    __syncthreads();

    for (; n < job.total; n += step, parity ^= 1) {
        const uint32_t stage = kStages<T> == 2 ? parity : 0;
        if (kStages<T> == 2) fetch(n + step, parity ^ 1);
        float cos[4], sin[4];
        pairs.at<sizeof(T) == 2>(position, cos, sin);
        if (n + step < job.total) position = position_of(n + step);
        const auto dx_row = [&] {
            const uint32_t b = batch_of(n);
            return t.dx.row(b, n - b * job.length) + 8 * first;
        };
        copies_wait<kStages<T> - 1>();
        const auto* const x_row = reinterpret_cast<const uint4*>(mine + stage * 2 * kRow);
        const auto* const grad_row = x_row + kRow / 16;
        if (!has_norm) {
            T* const dx = dx_row();
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (S::kFull || i * S::kStride < left) {
                    float g[8];
                    unpack(fetched<T>(grad_row, i), g);
                    rotate_back(g, cos, sin);
                    store(dx + i * S::kStride * 8, pack<T>(g));
                }
            }
            if (kStages<T> == 1) fetch(n + step, 0);
            continue;
        }
        // With g the gradient turned back: the sums of x^2 and g w x.
        float square[N], along[N];  // of each eight, per head only
        float2 both = make_float2(0.0f, 0.0f);
#pragma unroll(S::kFull ? 2 : N)
        for (int i = 0; i < N; ++i) {
            float2 here = make_float2(0.0f, 0.0f);
            if (S::kFull || i * S::kStride < left) {
                float x[8], g[8], w[8];
                unpack(fetched<T>(x_row, i), x);
                unpack(fetched<T>(grad_row, i), g);
                weight.template read<true>(i, w);
                rotate_back(g, cos, sin);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    here.x = fmaf(x[j], x[j], here.x);
                    here.y = fmaf(g[j] * w[j], x[j], here.y);
                }
            }
            if constexpr (!S::kFull) square[i] = here.x, along[i] = here.y;
            both.x += here.x;
            both.y += here.y;
            __syncwarp();
        }
        float rstd = 1.0f, c = 0.0f;
        if (per_head) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                square[i] = rsqrtf(sum_lanes(square[i], head_lanes) * t.share + job.eps);  // from here rstd
                along[i] = sum_lanes(along[i], head_lanes) * t.share * square[i] * square[i] * square[i];
            }
        } else {
            both = sum_team<S::kTeam>(both, cells, warp, parity);
            rstd = rsqrtf(both.x * t.share + job.eps);
            c = both.y * t.share * rstd * rstd * rstd;
#pragma unroll
            for (int i = 0; i < 4; ++i) cos[i] *= rstd, sin[i] *= rstd;
        }
        T* const dx = dx_row();
        // Now g is the gradient turned back times rstd, and dx = g w - x rstd^3 mean(g w x). Rows and
        // weight are read again: registers are for the weight's gradient.
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (S::kFull || i * S::kStride < left) {
                float x[8], g[8], w[8];
                unpack(fetched<T, true>(x_row, i), x);
                unpack(fetched<T, true>(grad_row, i), g);
                weight.template read<true>(i, w);
                rotate_back(g, cos, sin);
                if (per_head) {
                    c = along[i];
#pragma unroll
                    for (int j = 0; j < 8; ++j) g[j] *= square[i];
                }
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    sums[i][j] = fmaf(g[j], x[j], sums[i][j]);
                    g[j] = fmaf(g[j], w[j], -x[j] * c);
                }
                store(dx + i * S::kStride * 8, pack<T>(g));
            }
            // Nothing of the next eights is read before: without it the compiler reads all at once, and spills.
            __syncwarp();
        }
        if (kStages<T> == 1) fetch(n + step, 0);
    }

    if (!has_norm || t.partial == nullptr) return;
    // The stages become [team][channel]; a team's stages have room for its float32 row.
    copies_wait<0>();
    __syncthreads();
    auto* const table = reinterpret_cast<float*>(shared);
    const int channels = 8 * t.eights;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (S::kFull || i * S::kStride < left) {
            auto* p = reinterpret_cast<float4*>(table + team * channels + 8 * (first + i * S::kStride));
            p[0] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
            p[1] = make_float4(sums[i][4], sums[i][5], sums[i][6], sums[i][7]);
        }
    }
    __syncthreads();
    const int width = per_head ? job.dim : channels;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = 0.0f;
        for (int j = i; j < teams * channels; j += width) sum += table[j];
        t.partial[static_cast<int64_t>(block) * width + i] = sum;
    }
}

// One sum down the columns of partial [blocks, width], for each tensor.
struct PartialSums {
    const float* partial;
    void* out;  // [width]
    Dtype dtype;
    int blocks, width;
};

constexpr int kSumRows = 8;  // threads of a column

static __global__ void __launch_bounds__(32 * kSumRows) add_partial_sums(PartialSums q, PartialSums k) {
    __shared__ float cells[kSumRows][32];
    const int q_tiles = q.partial == nullptr ? 0 : (q.width + 31) / 32;
    const bool is_query = blockIdx.x < q_tiles;
    const PartialSums& s = is_query ? q : k;
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
    const int column = (blockIdx.x - (is_query ? 0 : q_tiles)) * 32 + lane;
    wait_for_previous();
    float sum = 0.0f;
    if (column < s.width) {
#pragma unroll 8
        for (int i = row; i < s.blocks; i += kSumRows)
            sum += __ldcg(s.partial + static_cast<int64_t>(i) * s.width + column);
    }
    cells[row][lane] = sum;
    __syncthreads();
    if (row == 0 && column < s.width) {
#pragma unroll
        for (int i = 1; i < kSumRows; ++i) sum += cells[i][lane];
        store_any(s.out, column, sum, s.dtype);
    }
}

template <typename S, typename T>
cudaError_t launch_backward_of(const GradJob<T>& job, cudaStream_t stream) {
    size_t weight = weight_bytes(job.q.weight, job.q.eights, job.dim, job.per_head);
    const size_t other = weight_bytes(job.k.weight, job.k.eights, job.dim, job.per_head);
    if (other > weight) weight = other;
    const size_t bytes = static_cast<size_t>(kStages<T>) * 2 * kRowBytes<T, S>;
    const auto fit = static_cast<int>((kSharedBytes - kStaticBytes - weight) / bytes);
    const int blocks = job.q.blocks < job.k.blocks ? job.q.blocks : job.k.blocks;
    const int warps = balanced_warps(job.total, blocks, S::kTeam, fit < kMostGradWarps ? fit : kMostGradWarps);
    return launch_overlapped(norm_rope_backward<T, S>, job.q.blocks + job.k.blocks, 32 * warps, weight + warps * bytes,
                             stream, job);
}

// Queues the gradients; rows as in launch_rows. q_sum and k_sum: the gradients of the weights, empty where not wanted.
template <typename T>
cudaError_t launch_backward(const GradJob<T>& job, const PartialSums& q_sum, const PartialSums& k_sum,
                            cudaStream_t stream) {
    const bool one_norm = !job.per_head && job.q.weight.data != nullptr && job.k.weight.data != nullptr;
    const auto status = with_shape<T, 5>(job.q.eights, job.k.eights, one_norm,
                                         [&](auto shape) { return launch_backward_of<decltype(shape)>(job, stream); });
    const auto tiles = [](const PartialSums& s) { return s.partial == nullptr ? 0u : (s.width + 31u) / 32u; };
    const unsigned blocks = tiles(q_sum) + tiles(k_sum);
    if (status != cudaSuccess || blocks == 0) return status;
    return launch_overlapped(add_partial_sums, blocks, 32 * kSumRows, 0, stream, q_sum, k_sum);
}

}  // namespace raven
