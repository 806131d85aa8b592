// raven_cuda::norm_rope_rows: the forward of qk_norm_rope, and kv_append with its caches.
#include "interface.h"
#include "raven/qk_norm_rope.cuh"

namespace raven {
namespace {

template <typename T>
Rows<T> rows(const Tensor& x) {
    return {pointer<T>(x), x.stride(0), x.stride(1)};
}

template <typename T>
Rows<T> rows(const std::optional<Tensor>& x) {
    return x.has_value() ? rows<T>(*x) : Rows<T>{nullptr, 0, 0};
}

struct Arguments {
    const Tensor &q, &k;
    const std::optional<Tensor>& v;
    const Tensor &q_out, &k_out;
    const std::optional<Tensor>&v_out, &k_scale, &v_scale;
    Weight q_weight, k_weight;
    const Tensor& positions;
    const std::optional<Tensor>& slots;
    const Tensor& frequencies;
    double eps;
    bool per_head, rotate_keys;
};

template <typename T>
RowTensor<T> row_tensor(const Tensor& x, const Tensor& out, const std::optional<Tensor>& scale, Weight weight,
                        bool per_head) {
    const int64_t dim = x.size(3), channels = x.size(2) * dim;
    return {rows<const T>(x),
            rows<void>(out),
            rows<float>(scale),
            weight,
            static_cast<int>(channels / 8),
            1.0f / static_cast<float>(per_head ? dim : channels)};
}

template <typename T, typename Stored>
void run(const Arguments& a) {
    const int64_t length = a.q.size(1), dim = a.q.size(3);
    RowJob<T> job{};
    job.tensors[0] = row_tensor<T>(a.q, a.q_out, std::nullopt, a.q_weight, a.per_head);
    job.tensors[1] = row_tensor<T>(a.k, a.k_out, a.k_scale, a.k_weight, a.per_head);
    if (a.v.has_value()) job.tensors[2] = row_tensor<T>(*a.v, *a.v_out, a.v_scale, Weight{}, a.per_head);
    job.rows = a.v.has_value() ? 3 : 2;
    job.positions = pointer<const int32_t>(a.positions);
    job.position_batch = a.positions.dim() == 3 ? 3 * length : 0;
    job.slots = pointer<const int32_t>(a.slots);
    job.frequencies = pointer<const int64_t>(a.frequencies);
    job.total = static_cast<uint32_t>(a.q.size(0) * length);
    job.length = static_cast<uint32_t>(length);
    job.dim = static_cast<int>(dim);
    job.per_head = a.per_head;
    job.rotate_keys = a.rotate_keys;
    job.eps = static_cast<float>(a.eps);
    check_cuda(launch_rows<Stored>(job, current_stream(a.q)), "norm_rope_rows");
}

template <typename T>
void run_stored(const Arguments& a) {
    if (a.k_scale.has_value()) {
        run<T, __nv_fp8_e4m3>(a);
    } else {
        run<T, T>(a);
    }
}

void norm_rope_rows_op(Tensor q, Tensor k, std::optional<Tensor> v, Tensor q_out, Tensor k_out,
                       std::optional<Tensor> v_out, std::optional<Tensor> k_scale, std::optional<Tensor> v_scale,
                       std::optional<Tensor> q_weight, int64_t q_weight_dtype, std::optional<Tensor> k_weight,
                       int64_t k_weight_dtype, Tensor positions, std::optional<Tensor> slots, Tensor frequencies,
                       double eps, bool per_head, bool rotate_keys) {
    const Arguments a{q,
                      k,
                      v,
                      q_out,
                      k_out,
                      v_out,
                      k_scale,
                      v_scale,
                      Weight{pointer<const void>(q_weight), static_cast<Dtype>(q_weight_dtype)},
                      Weight{pointer<const void>(k_weight), static_cast<Dtype>(k_weight_dtype)},
                      positions,
                      slots,
                      frequencies,
                      eps,
                      per_head,
                      rotate_keys};
    switch (q.scalar_type()) {
        case ScalarType::BFloat16:
            return run_stored<__nv_bfloat16>(a);
        case ScalarType::Half:
            return run_stored<__half>(a);
        default:
            return run_stored<float>(a);
    }
}

}  // namespace
}  // namespace raven

STABLE_TORCH_LIBRARY_FRAGMENT(raven_cuda, m) {
    m.def(
        "norm_rope_rows(Tensor q, Tensor k, Tensor? v, Tensor(a!) q_out, Tensor(b!) k_out, Tensor(c!)? v_out, "
        "Tensor(d!)? k_scale, Tensor(e!)? v_scale, Tensor? q_weight, int q_weight_dtype, Tensor? k_weight, "
        "int k_weight_dtype, Tensor positions, Tensor? slots, Tensor frequencies, float eps, bool per_head, bool "
        "rotate_keys) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(raven_cuda, CUDA, m) { m.impl("norm_rope_rows", TORCH_BOX(&raven::norm_rope_rows_op)); }
