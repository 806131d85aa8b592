// Moving rows of channels: eight neighbouring channels a thread at a time, and the order of dependent kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace raven {

// Dtypes as Python numbers them for the kernels (raven/ops/qk_norm_rope.py).
enum class Dtype : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Eight neighbouring channels as they lie in memory: 16 bytes of a two-byte type, 32 of float.
template <typename T>
struct Eight {
    uint4 part[sizeof(T) / 2];
};

// A tensor [B, L, heads, D] whose heads are packed in each token; strides in elements.
template <typename T>
struct Rows {
    T* data;
    int64_t batch;
    int64_t token;

    __device__ T* row(uint32_t b, int64_t t) const { return data + b * batch + t * token; }
};

// Volatile, so that loads stay where they are written. Without hints: to keep rows out of L1 costs bandwidth.
__device__ inline uint4 load16(const void* p) {
    uint4 x;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(p)
                 : "memory");
    return x;
}

__device__ inline void store16(void* p, uint4 x) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

// Into this thread's own shared memory, which it may read after copies_wait.
__device__ inline void copy16(uint32_t shared, const void* p) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(shared), "l"(p) : "memory");
}

// From shared memory, now: the compiler neither keeps an earlier read of it in registers nor moves this one.
__device__ inline uint4 read16(const void* p) {
    uint4 x;
    asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(p))));
    return x;
}

__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int Pending>
__device__ inline void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

template <typename T>
__device__ inline Eight<T> load(const T* p) {
    Eight<T> x;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) x.part[i] = load16(reinterpret_cast<const uint4*>(p) + i);
    return x;
}

template <typename T>
__device__ inline void store(T* p, const Eight<T>& x) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) store16(reinterpret_cast<uint4*>(p) + i, x.part[i]);
}

__device__ inline void unpack(const Eight<float>& x, float (&y)[8]) {
    const uint32_t bits[8] = {x.part[0].x, x.part[0].y, x.part[0].z, x.part[0].w,
                              x.part[1].x, x.part[1].y, x.part[1].z, x.part[1].w};
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = __uint_as_float(bits[i]);
}

__device__ inline void unpack(const Eight<__nv_bfloat16>& x, float (&y)[8]) {
    const uint32_t bits[4] = {x.part[0].x, x.part[0].y, x.part[0].z, x.part[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        y[2 * i] = __uint_as_float(bits[i] << 16);
        y[2 * i + 1] = __uint_as_float(bits[i] & 0xffff0000u);
    }
}

__device__ inline void unpack(const Eight<__half>& x, float (&y)[8]) {
    const uint32_t bits[4] = {x.part[0].x, x.part[0].y, x.part[0].z, x.part[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(bits[i]));
        y[2 * i] = pair.x;
        y[2 * i + 1] = pair.y;
    }
}

template <typename T>
__device__ inline Eight<T> pack(const float (&x)[8]);

template <>
__device__ inline Eight<float> pack<float>(const float (&x)[8]) {
    Eight<float> y;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        y.part[i] = make_uint4(__float_as_uint(x[4 * i]), __float_as_uint(x[4 * i + 1]), __float_as_uint(x[4 * i + 2]),
                               __float_as_uint(x[4 * i + 3]));
    }
    return y;
}

template <>
__device__ inline Eight<__nv_bfloat16> pack<__nv_bfloat16>(const float (&x)[8]) {
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        bits[i] = reinterpret_cast<const uint32_t&>(pair);
    }
    return {{make_uint4(bits[0], bits[1], bits[2], bits[3])}};
}

template <>
__device__ inline Eight<__half> pack<__half>(const float (&x)[8]) {
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
        bits[i] = reinterpret_cast<const uint32_t&>(pair);
    }
    return {{make_uint4(bits[0], bits[1], bits[2], bits[3])}};
}

// Eight numbers within the range of e4m3, times `factor`.
__device__ inline uint2 pack_e4m3(const float (&x)[8], float factor) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        pairs[i] =
            __nv_cvt_float2_to_fp8x2(make_float2(x[2 * i] * factor, x[2 * i + 1] * factor), __NV_SATFINITE, __NV_E4M3);
    }
    return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

// Eight elements of a 16-byte aligned tensor whose dtype is known at run time only.
__device__ inline void load_any(const void* data, int eight, Dtype dtype, float (&x)[8]) {
    switch (dtype) {
        case Dtype::kFloat16:
            return unpack(load(static_cast<const __half*>(data) + 8 * eight), x);
        case Dtype::kBFloat16:
            return unpack(load(static_cast<const __nv_bfloat16*>(data) + 8 * eight), x);
        default:
            return unpack(load(static_cast<const float*>(data) + 8 * eight), x);
    }
}

__device__ inline void store_any(void* data, int64_t index, float x, Dtype dtype) {
    switch (dtype) {
        case Dtype::kFloat16:
            static_cast<__half*>(data)[index] = __float2half_rn(x);
            break;
        case Dtype::kBFloat16:
            static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(x);
            break;
        default:
            static_cast<float*>(data)[index] = x;
    }
}

// Programmatic dependent launch. A kernel may become resident while the one before it still runs; it touches memory
// only after `wait_for_previous`, when all of that one's writes are visible. Only then does it let the next one come,
// so that no third kernel is ever resident.
__device__ inline void wait_for_previous() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

constexpr size_t kStaticBytes = 2048;  // of shared memory beside the dynamic, at most; and room to align

// Launch with that overlap; 48 KiB of shared memory, static and dynamic, and less need no attribute.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_overlapped(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared,
                              cudaStream_t stream, Arguments&&... arguments) {
    if (shared + kStaticBytes > 48 * 1024) {
        const auto status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (status != cudaSuccess) return status;
    }
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
}

}  // namespace raven
