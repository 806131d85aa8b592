// policy_loss for torch.ops.raven_cuda: raven/ops/policy_loss.py has checked every argument.
#include "raven/policy_loss.cuh"
#include "row_sums.h"

namespace raven {

void policy_loss_op(Tensor v, Tensor x_t, Tensor x_s, std::optional<Tensor> t, double t_value, std::optional<Tensor> s,
                    double s_value, Tensor advantages, Tensor weights, double scale, std::optional<Tensor> borders,
                    int64_t channels, int64_t frames, int64_t chunks, int64_t piece, int64_t splits, Tensor partial,
                    Tensor counters, Tensor log_prob, Tensor loss, std::optional<Tensor> d_v) {
    const cudaError_t status =
        policy_loss(row_inputs(v, x_t, x_s), row_geometry(v, channels, frames, chunks, borders, piece, splits),
                    row_level(t, t_value), row_level(s, s_value), row_level(advantages, 0.0), pointer<float>(weights),
                    static_cast<float>(scale), pointer<float>(partial), pointer<unsigned>(counters),
                    pointer<float>(log_prob), pointer<float>(loss), pointer<void>(d_v), current_stream(v));
    check_cuda(status, "policy_loss");
}

}  // namespace raven

STABLE_TORCH_LIBRARY_FRAGMENT(raven_cuda, m) {
    m.def(
        "policy_loss(Tensor v, Tensor x_t, Tensor x_s, Tensor? t, float t_value, Tensor? s, float s_value, "
        "Tensor advantages, Tensor weights, float scale, Tensor? borders, int channels, int frames, int chunks, "
        "int piece, int splits, Tensor(a!) partial, Tensor(b!) counters, Tensor(c!) log_prob, Tensor(d!) loss, "
        "Tensor(e!)? d_v) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(raven_cuda, CUDA, m) { m.impl("policy_loss", TORCH_BOX(&raven::policy_loss_op)); }
