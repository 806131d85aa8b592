// gaussian_log_prob for torch.ops.raven_cuda: raven/ops/gaussian_log_prob.py has checked every argument.
#include "raven/gaussian_log_prob.cuh"
#include "row_sums.h"

namespace raven {

void log_prob_forward_op(Tensor v, Tensor x_t, Tensor x_s, std::optional<Tensor> t, double t_value,
                         std::optional<Tensor> s, double s_value, std::optional<Tensor> borders, int64_t channels,
                         int64_t frames, int64_t chunks, int64_t piece, int64_t splits, Tensor partial, Tensor counters,
                         Tensor out, std::optional<Tensor> d_v) {
    const cudaError_t status = gaussian_log_prob_forward(
        row_inputs(v, x_t, x_s), row_geometry(v, channels, frames, chunks, borders, piece, splits),
        row_level(t, t_value), row_level(s, s_value), pointer<float>(partial), pointer<unsigned>(counters),
        pointer<float>(out), pointer<void>(d_v), current_stream(v));
    check_cuda(status, "gaussian_log_prob_forward");
}

void log_prob_backward_op(Tensor grad, Tensor v, Tensor x_t, Tensor x_s, std::optional<Tensor> t, double t_value,
                          std::optional<Tensor> s, double s_value, std::optional<Tensor> borders, int64_t channels,
                          int64_t frames, int64_t chunks, int64_t piece, int64_t splits, std::optional<Tensor> d_v,
                          std::optional<Tensor> d_x_t, std::optional<Tensor> d_x_s) {
    const cudaError_t status = gaussian_log_prob_backward(
        row_inputs(v, x_t, x_s), row_geometry(v, channels, frames, chunks, borders, piece, splits),
        row_level(t, t_value), row_level(s, s_value), row_level(grad, 0.0), pointer<void>(d_v), pointer<void>(d_x_t),
        pointer<void>(d_x_s), current_stream(v));
    check_cuda(status, "gaussian_log_prob_backward");
}

void scale_gradient_op(Tensor grad, Tensor gradient, std::optional<Tensor> borders, int64_t channels, int64_t frames,
                       int64_t chunks, int64_t piece, int64_t splits, Tensor out) {
    const cudaError_t status = scale_gradient(gradient.data_ptr(), out.data_ptr(), row_type(out),
                                              row_geometry(out, channels, frames, chunks, borders, piece, splits),
                                              row_level(grad, 0.0), current_stream(out));
    check_cuda(status, "gaussian_step_scale_gradient");
}

}  // namespace raven

STABLE_TORCH_LIBRARY_FRAGMENT(raven_cuda, m) {
    m.def(
        "gaussian_log_prob_forward(Tensor v, Tensor x_t, Tensor x_s, Tensor? t, float t_value, Tensor? s, "
        "float s_value, Tensor? borders, int channels, int frames, int chunks, int piece, int splits, Tensor(a!) "
        "partial, "
        "Tensor(b!) counters, Tensor(c!) out, Tensor(d!)? d_v) -> ()");
    m.def(
        "gaussian_log_prob_backward(Tensor grad, Tensor v, Tensor x_t, Tensor x_s, Tensor? t, float t_value, "
        "Tensor? s, float s_value, Tensor? borders, int channels, int frames, int chunks, int piece, int splits, "
        "Tensor(a!)? d_v, "
        "Tensor(b!)? d_x_t, Tensor(c!)? d_x_s) -> ()");
    m.def(
        "gaussian_step_scale_gradient(Tensor grad, Tensor gradient, Tensor? borders, int channels, int frames, "
        "int chunks, int piece, int splits, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(raven_cuda, CUDA, m) {
    m.impl("gaussian_log_prob_forward", TORCH_BOX(&raven::log_prob_forward_op));
    m.impl("gaussian_log_prob_backward", TORCH_BOX(&raven::log_prob_backward_op));
    m.impl("gaussian_step_scale_gradient", TORCH_BOX(&raven::scale_gradient_op));
}
