// Host side of the bulk copies: a description of a tensor [B, L, H, D] that the copy engine cuts tiles from.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace raven {

struct Strides {  // of batch, token and head, in elements; the head dimension is contiguous
    int64_t batch, token, head;
};

// Boxes of 64 columns and `rows` tokens of one head, in the 128-byte swizzle that the tensor cores read; rows behind
// the tensor's end arrive as zeros. The driver's function is looked up, so that nothing links against libcuda.
inline cudaError_t make_tensor_map(CUtensorMap* map, CUtensorMapDataType type, const void* data, int64_t batch,
                                   int64_t length, int64_t heads, int64_t head_dim, Strides strides, uint32_t rows) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
    }();
    if (encode == nullptr) return cudaErrorNotSupported;
    // The stride of a dimension of size 1 is never used, but the driver still wants a legal one.
    const cuuint64_t bytes = 2, any = 16;
    const cuuint64_t sizes[4] = {cuuint64_t(head_dim), cuuint64_t(length), cuuint64_t(heads), cuuint64_t(batch)};
    const cuuint64_t steps[3] = {length == 1 ? any : strides.token * bytes, heads == 1 ? any : strides.head * bytes,
                                 batch == 1 ? any : strides.batch * bytes};
    const cuuint32_t box[4] = {64, rows, 1, 1}, unit[4] = {1, 1, 1, 1};
    const CUresult status =
        encode(map, type, 4, const_cast<void*>(data), sizes, steps, box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace raven
