// raven_cuda::norm_rope_backward: the gradients of qk_norm_rope. Its forward is in kv_append.cu.
#include "interface.h"
#include "raven/qk_norm_rope_backward.cuh"

namespace raven {
namespace {

template <typename T>
Rows<T> rows(const Tensor& x) {
    return {pointer<T>(x), x.stride(0), x.stride(1)};
}

struct Arguments {
    const Tensor &grad_q, &grad_k, &q, &k, &dq, &dk;
    Weight q_weight, k_weight;
    const std::optional<Tensor>&q_partial, &k_partial, &dq_weight, &dk_weight;
    const Tensor& positions;
    const Tensor& frequencies;
    double eps;
    bool per_head;
    int64_t q_blocks, k_blocks;
};

PartialSums sums(const std::optional<Tensor>& partial, const std::optional<Tensor>& out, Dtype dtype, int64_t blocks) {
    if (!partial.has_value()) return {};
    return {pointer<const float>(*partial), pointer<void>(out), dtype, static_cast<int>(blocks),
            static_cast<int>(out->numel())};
}

template <typename T>
void run(const Arguments& a) {
    const int64_t length = a.q.size(1), dim = a.q.size(3);
    GradJob<T> job{};
    job.q = {rows<const T>(a.q),
             rows<const T>(a.grad_q),
             rows<T>(a.dq),
             a.q_weight,
             pointer<float>(a.q_partial),
             static_cast<int>(a.q.size(2) * dim / 8),
             static_cast<int>(a.q_blocks)};
    job.k = {rows<const T>(a.k),
             rows<const T>(a.grad_k),
             rows<T>(a.dk),
             a.k_weight,
             pointer<float>(a.k_partial),
             static_cast<int>(a.k.size(2) * dim / 8),
             static_cast<int>(a.k_blocks)};
    job.positions = pointer<const int32_t>(a.positions);
    job.position_batch = a.positions.dim() == 3 ? 3 * length : 0;
    job.frequencies = pointer<const int64_t>(a.frequencies);
    job.total = static_cast<uint32_t>(a.q.size(0) * length);
    job.length = static_cast<uint32_t>(length);
    job.dim = static_cast<int>(dim);
    job.q.share = 1.0f / static_cast<float>(a.per_head ? dim : 8 * job.q.eights);
    job.k.share = 1.0f / static_cast<float>(a.per_head ? dim : 8 * job.k.eights);
    job.per_head = a.per_head;
    job.eps = static_cast<float>(a.eps);
    check_cuda(launch_backward(job, sums(a.q_partial, a.dq_weight, a.q_weight.dtype, a.q_blocks),
                               sums(a.k_partial, a.dk_weight, a.k_weight.dtype, a.k_blocks), current_stream(a.q)),
               "norm_rope_backward");
}

void norm_rope_backward_op(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor dq, Tensor dk,
                           std::optional<Tensor> q_weight, int64_t q_weight_dtype, std::optional<Tensor> k_weight,
                           int64_t k_weight_dtype, std::optional<Tensor> q_partial, std::optional<Tensor> k_partial,
                           std::optional<Tensor> dq_weight, std::optional<Tensor> dk_weight, Tensor positions,
                           Tensor frequencies, double eps, bool per_head, int64_t q_blocks, int64_t k_blocks) {
    const Arguments a{grad_q,
                      grad_k,
                      q,
                      k,
                      dq,
                      dk,
                      Weight{pointer<const void>(q_weight), static_cast<Dtype>(q_weight_dtype)},
                      Weight{pointer<const void>(k_weight), static_cast<Dtype>(k_weight_dtype)},
                      q_partial,
                      k_partial,
                      dq_weight,
                      dk_weight,
                      positions,
                      frequencies,
                      eps,
                      per_head,
                      q_blocks,
                      k_blocks};
    switch (q.scalar_type()) {
        case ScalarType::BFloat16:
            return run<__nv_bfloat16>(a);
        case ScalarType::Half:
            return run<__half>(a);
        default:
            return run<float>(a);
    }
}

}  // namespace
}  // namespace raven

STABLE_TORCH_LIBRARY_FRAGMENT(raven_cuda, m) {
    m.def(
        "norm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor(a!) dq, Tensor(b!) dk, "
        "Tensor? q_weight, int q_weight_dtype, Tensor? k_weight, int k_weight_dtype, Tensor(c!)? q_partial, "
        "Tensor(d!)? k_partial, Tensor(e!)? dq_weight, Tensor(f!)? dk_weight, Tensor positions, Tensor frequencies, "
        "float eps, bool per_head, int q_blocks, int k_blocks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(raven_cuda, CUDA, m) {
    m.impl("norm_rope_backward", TORCH_BOX(&raven::norm_rope_backward_op));
}
