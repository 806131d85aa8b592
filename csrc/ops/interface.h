// What every op file needs between torch's stable ABI and a kernel header: the stream, pointers, launch errors.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace raven {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The stream that PyTorch is recording on for the tensor's device. Python has made that device the current one.
inline cudaStream_t current_stream(const Tensor& x) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(cudaError_t status, const char* what) {
    STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// Data pointer of an optional tensor; a missing one is a null pointer.
template <typename T>
T* pointer(const std::optional<Tensor>& x) {
    return x.has_value() ? static_cast<T*>(x->data_ptr()) : nullptr;
}

template <typename T>
T* pointer(const Tensor& x) {
    return static_cast<T*>(x.data_ptr());
}

}  // namespace raven
