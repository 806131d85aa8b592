// Log-density of a consistency step, summed over rows, and its gradients (RAVEN, arXiv 2605.15190).
//
// With e = x_s - (1 - s)(x_t - t v): log N = -sum e^2 / (2 s^2) - d log s - d/2 log 2 pi over the d elements of a row,
// and its gradients in v, x_t, x_s are -t (1 - s) e / s^2, (1 - s) e / s^2, -e / s^2.
#pragma once

#include <algorithm>

#include "row_sums.cuh"

namespace raven {

namespace rows {

constexpr float kHalfLog2Pi = 0.9189385332046727f;

// Levels on the device cannot be refused without a synchronisation: a bad one gives NaN, never a plausible number.
__device__ inline bool valid(float t, float s) { return s > 0.0f && s <= 1.0f && t >= 0.0f && t <= 1.0f; }

__device__ inline float nan() { return __int_as_float(0x7fffffff); }

// Rounded the same in every kernel, whatever else the compiler could fuse there: two kernels give the same log-density.
__device__ inline float residual(float v, float x_t, float x_s, float t, float a) {
    return __fmaf_rn(-a, __fmaf_rn(-t, v, x_t), x_s);
}

__device__ inline float4 residual(float4 v, float4 x_t, float4 x_s, float t, float a) {
    return make_float4(residual(v.x, x_t.x, x_s.x, t, a), residual(v.y, x_t.y, x_s.y, t, a),
                       residual(v.z, x_t.z, x_s.z, t, a), residual(v.w, x_t.w, x_s.w, t, a));
}

__device__ inline float4 scaled(float factor, float4 e) {
    return make_float4(factor * e.x, factor * e.y, factor * e.z, factor * e.w);
}

__device__ inline void add_squares(float4& sum, float4 e, int count) {
    sum.x = __fmaf_rn(e.x, e.x, sum.x);
    if (count > 1) sum.y = __fmaf_rn(e.y, e.y, sum.y);
    if (count > 2) sum.z = __fmaf_rn(e.z, e.z, sum.z);
    if (count > 3) sum.w = __fmaf_rn(e.w, e.w, sum.w);
}

__device__ inline float total(float4 x) { return (x.x + x.y) + (x.z + x.w); }

// Log-density of a row from its sum of squares.
__device__ inline float log_density(const Geometry& g, const Piece& p, float squares, float t, float s) {
    const float size = static_cast<float>(p.frames * g.plane * g.channels);
    return valid(t, s) ? __fmaf_rn(-size, logf(s) + kHalfLog2Pi, -squares / (2.0f * s * s)) : nan();
}

template <typename V, typename X, typename G>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    log_prob_forward(V v, X x_t, X x_s, G d_v, Geometry g, Level t_level, Level s_level, float* partial,
                     unsigned* counters, float* out) {
    const Piece p = locate(g, blockIdx.x);
    const float t = t_level.at(p.sample, p.chunk), s = s_level.at(p.sample, p.chunk), a = 1.0f - s;
    float4 squares = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float factor = valid(t, s) ? -(t * a) / (s * s) : nan();
    walk(p, v, x_t, x_s, [&](int i, int count, float4 v, float4 x_t, float4 x_s) {
        const float4 e = residual(v, x_t, x_s, t, a);
        add_squares(squares, e, count);
        if (d_v.data != nullptr) d_v.store(p.start + i, count, scaled(factor, e));
    });
    float sum;
    if (row_sum(g, p, total(squares), partial, counters, &sum) && threadIdx.x == 0) {
        out[p.row] = log_density(g, p, sum, t, s);
    }
}

template <typename V, typename X>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    log_prob_backward(V v, X x_t, X x_s, V d_v, X d_x_t, X d_x_s, Geometry g, Level t_level, Level s_level,
                      Level grad) {
    const Piece p = locate_from_the_end(g);
    const float t = t_level.at(p.sample, p.chunk), s = s_level.at(p.sample, p.chunk), a = 1.0f - s;
    const float g_row = grad.at(p.sample, p.chunk), square = valid(t, s) ? s * s : nan();
    // The gradient of v is rounded as if the forward had written it for a gradient of 1.
    const float factor = -(t * a) / square, scale = g_row / square;
    walk(p, v, x_t, x_s, [&](int i, int count, float4 v, float4 x_t, float4 x_s) {
        const float4 e = residual(v, x_t, x_s, t, a);
        if (d_v.data != nullptr) d_v.store(p.start + i, count, scaled(g_row, scaled(factor, e)));
        if (d_x_t.data != nullptr) d_x_t.store(p.start + i, count, scaled(a * scale, e));
        if (d_x_s.data != nullptr) d_x_s.store(p.start + i, count, scaled(-scale, e));
    });
}

// What was written for a gradient of 1, times the gradient, at elements [begin, end), as many as a block loads at once.
template <typename In, typename Out>
__device__ void scale_piece(In in, Out out, int64_t begin, int64_t end, float factor) {
    const auto count = [&](int64_t i) { return static_cast<int>(min(static_cast<int64_t>(kVector), end - i)); };
    begin += threadIdx.x * kVector;
    float4 x[kScaleSteps];
#pragma unroll
    for (int u = 0; u < kScaleSteps; ++u) {
        const int64_t i = begin + u * kStep;
        if (i < end) x[u] = in.load(i, count(i));
    }
#pragma unroll
    for (int u = 0; u < kScaleSteps; ++u) {
        const int64_t i = begin + u * kStep;
        if (i < end) out.store(i, count(i), scaled(factor, x[u]));
    }
}

// With a gradient for each row. Where that is 1 and nothing moves, there is no memory traffic.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) scale_rows(In in, Out out, Geometry g, Level grad) {
    const Piece p = locate_from_the_end(g);
    const float factor = grad.at(p.sample, p.chunk);
    if (factor == 1.0f && in.data == out.data) return;
    scale_piece(in, out, p.start + p.begin, p.start + p.end, factor);
}

// With one gradient for everything, in few blocks: where it is 1, starting them is all that there is to do.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) scale_all(In in, Out out, int64_t size, const float* grad) {
    const float factor = __ldg(grad);
    if (factor == 1.0f && in.data == out.data) return;
    constexpr int64_t piece = kScaleSteps * kStep;
    for (int64_t begin = blockIdx.x * piece; begin < size; begin += gridDim.x * piece) {
        scale_piece(in, out, begin, size, factor);
    }
}

}  // namespace rows

// log N of every row into out [B, chunks], and, unless null, its gradient in v into d_v, of v's type (float for half).
// partial holds rows * cells numbers, counters rows zeros (and leaves zeros).
inline cudaError_t gaussian_log_prob_forward(const rows::Inputs& in, const rows::Geometry& g, const rows::Level& t,
                                             const rows::Level& s, float* partial, unsigned* counters, float* out,
                                             void* d_v, cudaStream_t stream) {
    const bool vectors = rows::vectors(in, g) && rows::aligned(d_v, rows::gradient_type(in.v_type));
    rows::with_readers(in, vectors, [&](auto v, auto x_t, auto x_s) {
        rows::log_prob_forward<<<g.blocks(), rows::kThreads, 0, stream>>>(v, x_t, x_s, v.gradient(d_v), g, t, s,
                                                                          partial, counters, out);
    });
    return cudaGetLastError();
}

// The gradients that are not null, each in its input's type, for grad [B, chunks] of any strides.
inline cudaError_t gaussian_log_prob_backward(const rows::Inputs& in, const rows::Geometry& g, const rows::Level& t,
                                              const rows::Level& s, const rows::Level& grad, void* d_v, void* d_x_t,
                                              void* d_x_s, cudaStream_t stream) {
    const bool vectors = rows::vectors(in, g) && rows::aligned(d_v, in.v_type) && rows::aligned(d_x_t, in.x_t_type) &&
                         rows::aligned(d_x_s, in.x_s_type);
    rows::with_readers(in, vectors, [&](auto v, auto x_t, auto x_s) {
        rows::log_prob_backward<<<g.blocks(), rows::kThreads, 0, stream>>>(v, x_t, x_s, v.at(d_v), x_t.at(d_x_t),
                                                                           x_s.at(d_x_s), g, t, s, grad);
    });
    return cudaGetLastError();
}

// out = grad [B, chunks] * gradient, of which the first is of any strides and the second as a forward wrote it for v of
// `type`; out may be the same memory.
inline cudaError_t scale_gradient(const void* gradient, void* out, rows::Type type, rows::Geometry g,
                                  const rows::Level& grad, cudaStream_t stream) {
    void* in = const_cast<void*>(gradient);
    const rows::Type in_type = rows::gradient_type(type);
    // Nothing is summed here, so pieces need not be those of the forward: each is what a block loads at once.
    g.splits = (g.splits * (g.piece / rows::kStep) + rows::kScaleSteps - 1) / rows::kScaleSteps;
    g.piece = rows::kScaleSteps * rows::kStep;
    const bool uniform = grad.table != nullptr && grad.sample_stride == 0 && grad.chunk_stride == 0;
    const int64_t size = g.plane * g.frames * g.channels * g.samples;
    const unsigned few = static_cast<unsigned>(std::min<int64_t>((size + g.piece - 1) / g.piece, rows::kScaleBlocks));
    const auto launch = [&](auto from, auto to) {
        if (uniform) {
            rows::scale_all<<<few, rows::kThreads, 0, stream>>>(from, to, size, grad.table);
        } else {
            rows::scale_rows<<<g.blocks(), rows::kThreads, 0, stream>>>(from, to, g, grad);
        }
    };
    if (g.plane % rows::kVector == 0 && rows::aligned(in, in_type) && rows::aligned(out, type)) {
        rows::with_reader(out, type, [&](auto to) { launch(to.gradient(in), to); });
    } else {
        launch(rows::Any{in, in_type}, rows::Any{out, type});
    }
    return cudaGetLastError();
}

}  // namespace raven
