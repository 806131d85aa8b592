// chunk_attention, forward: torch tensors to the kernel's arguments.
#include "interface.h"
#include "raven/chunk_attention_forward.cuh"

namespace raven {
namespace {

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

}  // namespace

void chunk_attention_forward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor work, Tensor steps,
                             int64_t slots, Tensor counters, Tensor workspace, double scale, int64_t sms) {
    ForwardArguments a{};
    a.work = pointer<const ForwardWork>(work);
    a.steps = pointer<const int2>(steps);
    a.work_count = int(work.size(0));
    a.slot_count = int(slots);
    a.batch = int(q.size(0));
    a.counters = pointer<int>(counters);
    a.workspace = pointer<float>(workspace);
    a.out = pointer<void>(out);
    a.lse = pointer<float>(lse);
    a.length = q.size(1);
    a.heads = int(q.size(2));
    a.group = int(q.size(2) / k.size(2));
    a.scale = float(scale);
    const ForwardTensors x{pointer<void>(q), pointer<void>(k), pointer<void>(v), strides_of(q),
                           strides_of(k),    strides_of(v),    k.size(1),        int(sms)};
    const cudaStream_t stream = current_stream(q);
    const bool bf16 = q.scalar_type() == ScalarType::BFloat16, wide = q.size(3) == 128;
    cudaError_t status;
    if (bf16) {
        status =
            wide ? launch_forward<__nv_bfloat16, 128>(x, a, stream) : launch_forward<__nv_bfloat16, 64>(x, a, stream);
    } else {
        status = wide ? launch_forward<__half, 128>(x, a, stream) : launch_forward<__half, 64>(x, a, stream);
    }
    check_cuda(status, "chunk_attention");
}

}  // namespace raven

STABLE_TORCH_LIBRARY_FRAGMENT(raven_cuda, m) {
    m.def(
        "chunk_attention_forward(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, Tensor work, "
        "Tensor steps, int slots, Tensor(c!) counters, Tensor(d!) workspace, float scale, int sms) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(raven_cuda, CUDA, m) {
    m.impl("chunk_attention_forward", TORCH_BOX(&raven::chunk_attention_forward));
}
