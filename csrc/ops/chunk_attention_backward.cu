// chunk_attention, backward: torch tensors to the kernels' arguments.
#include "interface.h"
#include "raven/chunk_attention_backward.cuh"
#include "raven/chunk_attention_backward_rows.cuh"

namespace raven {
namespace {

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

template <typename T, int D, int QUERIES>
cudaError_t launch(const BackwardTensors& x, const BackwardArguments& a, const BackwardRows& rows,
                   cudaStream_t stream) {
    cudaError_t status = launch_backward_prepare<T, D, QUERIES>(rows, stream);
    if (status == cudaSuccess && a.item_count > 0) {
        status = launch_backward<T, BackwardTile<D, QUERIES>>(x, a, stream);
    }
    if (status == cudaSuccess) status = launch_backward_finish<T, D, QUERIES>(rows, stream);
    return status;
}

}  // namespace

void chunk_attention_backward(Tensor grad, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,
                              Tensor lse, Tensor dq, Tensor dk, Tensor dv, Tensor q_tiles, Tensor items,
                              Tensor key_tiles, Tensor visit_indptr, Tensor visits, Tensor rows, Tensor accumulator,
                              Tensor next_item, std::optional<Tensor> turns, double scale, int64_t sms) {
    const int heads = int(q.size(2));
    BackwardRows r{};
    r.tiles = pointer<const int2>(q_tiles);
    r.tile_count = int(q_tiles.size(0));
    r.heads = heads;
    r.batch = q.size(0);
    r.length = q.size(1);
    r.out = pointer<void>(out);
    r.grad = pointer<void>(grad);
    r.lse = pointer<float>(lse);
    r.grad_lse = pointer<float>(grad_lse);
    r.grad_strides = strides_of(grad);
    r.rows = pointer<float>(rows);
    r.accumulator = pointer<float>(accumulator);
    r.next_item = pointer<int>(next_item);
    r.turns = pointer<int>(turns);
    r.dq = pointer<void>(dq);
    r.scale = float(scale);

    BackwardArguments a{};
    a.items = pointer<const int2>(items);
    a.key_tiles = pointer<const int4>(key_tiles);
    a.visit_indptr = pointer<const int>(visit_indptr);
    a.visits = pointer<const int4>(visits);
    a.rows = r.rows;
    a.dq = r.accumulator;
    a.next_item = r.next_item;
    a.turns = r.turns;
    a.dk = pointer<void>(dk);
    a.dv = pointer<void>(dv);
    a.item_count = int(items.size(0));
    a.tiles = r.tile_count;
    a.heads = heads;
    a.group = heads / int(k.size(2));
    a.keys = k.size(1);
    a.scale = float(scale);

    const BackwardTensors x{pointer<void>(q), pointer<void>(k), pointer<void>(v), pointer<void>(grad),
                            strides_of(q),    strides_of(k),    strides_of(v),    strides_of(grad),
                            q.size(0),        q.size(1),        int(sms)};
    const cudaStream_t stream = current_stream(q);
    const bool bf16 = q.scalar_type() == ScalarType::BFloat16, wide = q.size(3) == 128;
    cudaError_t status;
    if (bf16) {
        status =
            wide ? launch<__nv_bfloat16, 128, 80>(x, a, r, stream) : launch<__nv_bfloat16, 64, 128>(x, a, r, stream);
    } else {
        status = wide ? launch<__half, 128, 80>(x, a, r, stream) : launch<__half, 64, 128>(x, a, r, stream);
    }
    check_cuda(status, "chunk_attention_backward");
}

}  // namespace raven

STABLE_TORCH_LIBRARY_FRAGMENT(raven_cuda, m) {
    m.def(
        "chunk_attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor q_tiles, Tensor items, Tensor key_tiles, "
        "Tensor visit_indptr, Tensor visits, Tensor(d!) rows, Tensor(e!) accumulator, Tensor(f!) next_item, "
        "Tensor(g!)? turns, float scale, int sms) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(raven_cuda, CUDA, m) {
    m.impl("chunk_attention_backward", TORCH_BOX(&raven::chunk_attention_backward));
}
