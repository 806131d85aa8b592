// Policy loss of a consistency step and its gradient in the velocity, in one pass (RAVEN, arXiv 2605.15190).
//
// loss = -scale / B * sum_b advantage_b sum_n weight_n log N_bn, and its gradient in v at an element of chunk n of
// sample b is scale / B * advantage_b weight_n t (1 - s) e / s^2, with e and log N of gaussian_log_prob.cuh.
#pragma once

#include "gaussian_log_prob.cuh"

namespace raven {

namespace rows {

template <typename V, typename X, typename G>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    policy_loss_and_gradient(V v, X x_t, X x_s, G d_v, Geometry g, Level t_level, Level s_level, Level advantages,
                             const float* weights, float scale, float* partial, unsigned* counters, float* log_prob,
                             float* loss) {
    const Piece p = locate(g, blockIdx.x);
    const float t = t_level.at(p.sample, p.chunk), s = s_level.at(p.sample, p.chunk), a = 1.0f - s;
    const float gain = scale / g.samples * (advantages.at(p.sample, 0) * __ldg(weights + p.chunk));
    const float factor = valid(t, s) ? gain * (t * a / (s * s)) : nan();
    float4 squares = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    walk(p, v, x_t, x_s, [&](int i, int count, float4 v, float4 x_t, float4 x_s) {
        const float4 e = residual(v, x_t, x_s, t, a);
        add_squares(squares, e, count);
        if (d_v.data != nullptr) d_v.store(p.start + i, count, scaled(factor, e));
    });
    float sum;
    if (!row_sum(g, p, total(squares), partial, counters, &sum)) return;
    if (threadIdx.x == 0) log_prob[p.row] = log_density(g, p, sum, t, s);
    if (!last_to_arrive(counters + g.rows(), g.rows())) return;
    sum = 0.0f;
    for (int sample = threadIdx.x; sample < g.samples; sample += kThreads) {
        float weighted = 0.0f;
        for (int n = 0; n < g.chunks; ++n) weighted += __ldg(weights + n) * __ldcg(log_prob + sample * g.chunks + n);
        sum += advantages.at(sample, 0) * weighted;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) *loss = -scale / g.samples * sum;
}

}  // namespace rows

// One number into loss, log N of every row into log_prob [B, chunks], and the loss's gradient into d_v, of v's type
// (float for half; null: not wanted). advantages [B] of any stride, weights [chunks]; partial holds rows * cells
// numbers, counters rows + 1 zeros (and leaves zeros).
inline cudaError_t policy_loss(const rows::Inputs& in, const rows::Geometry& g, const rows::Level& t,
                               const rows::Level& s, const rows::Level& advantages, const float* weights, float scale,
                               float* partial, unsigned* counters, float* log_prob, float* loss, void* d_v,
                               cudaStream_t stream) {
    const bool vectors = rows::vectors(in, g) && rows::aligned(d_v, rows::gradient_type(in.v_type));
    rows::with_readers(in, vectors, [&](auto v, auto x_t, auto x_s) {
        rows::policy_loss_and_gradient<<<g.blocks(), rows::kThreads, 0, stream>>>(
            v, x_t, x_s, v.gradient(d_v), g, t, s, advantages, weights, scale, partial, counters, log_prob, loss);
    });
    return cudaGetLastError();
}

}  // namespace raven
