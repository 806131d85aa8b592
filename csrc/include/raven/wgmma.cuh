// The warpgroup matrix product: D[64 x N] (+)= A[64 x 16] B[16 x N], float32 accumulators, bf16 or fp16 operands.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace raven {

// Accumulators live in `float d[N / 2]` per thread. Of row 16 * (t / 32 % 4) + t % 32 / 4 thread t holds the columns
// 8 j + 2 * (t % 4) + {0, 1} in d[4 j], d[4 j + 1], of the row 8 below in d[4 j + 2], d[4 j + 3].
template <typename T, int N>
struct Wgmma;

#define RAVEN_REGISTERS_32                     \
    "%0, %1, %2, %3, %4, %5, %6, %7"           \
    ", %8, %9, %10, %11, %12, %13, %14, %15"   \
    ", %16, %17, %18, %19, %20, %21, %22, %23" \
    ", %24, %25, %26, %27, %28, %29, %30, %31"
#define RAVEN_REGISTERS_40 \
    RAVEN_REGISTERS_32     \
    ", %32, %33, %34, %35, %36, %37, %38, %39"
#define RAVEN_REGISTERS_64                     \
    RAVEN_REGISTERS_40                         \
    ", %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55" \
    ", %56, %57, %58, %59, %60, %61, %62, %63"
#define RAVEN_BIND_8(i)                                                                                         \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define RAVEN_BIND_32 RAVEN_BIND_8(0), RAVEN_BIND_8(8), RAVEN_BIND_8(16), RAVEN_BIND_8(24)
#define RAVEN_BIND_40 RAVEN_BIND_32, RAVEN_BIND_8(32)
#define RAVEN_BIND_64 RAVEN_BIND_40, RAVEN_BIND_8(40), RAVEN_BIND_8(48), RAVEN_BIND_8(56)

// P0 ... P6: numbers of the operands behind the accumulators. ss: both operands in shared memory; rs: A in registers.
#define RAVEN_WGMMA(T, TYPE, N, COUNT, P0, P1, P2, P3, P4, P5, P6)                                                    \
    template <>                                                                                                       \
    struct Wgmma<T, N> {                                                                                              \
        template <bool TRANSPOSE_A, bool TRANSPOSE_B>                                                                 \
        static __device__ __forceinline__ void ss(float (&d)[COUNT], uint64_t a, uint64_t b, int accumulate) {        \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2                                                     \
                         ", 0;\n"                                                                                     \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" RAVEN_REGISTERS_##COUNT \
                         "}, %" #P0 ", %" #P1 ", p, 1, 1, %" #P3 ", %" #P4 ";\n}\n"                                   \
                         : RAVEN_BIND_##COUNT                                                                         \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(int(TRANSPOSE_A)), "n"(int(TRANSPOSE_B)));            \
        }                                                                                                             \
        template <bool TRANSPOSE_B>                                                                                   \
        static __device__ __forceinline__ void rs(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b,              \
                                                  int accumulate) {                                                   \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P5                                                     \
                         ", 0;\n"                                                                                     \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" RAVEN_REGISTERS_##COUNT \
                         "}, "                                                                                        \
                         "{%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, %" #P6 ";\n}\n"                \
                         : RAVEN_BIND_##COUNT                                                                         \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),                       \
                           "n"(int(TRANSPOSE_B)));                                                                    \
        }                                                                                                             \
    };

RAVEN_WGMMA(__nv_bfloat16, "bf16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
RAVEN_WGMMA(__nv_bfloat16, "bf16", 80, 40, 40, 41, 42, 43, 44, 45, 46)
RAVEN_WGMMA(__nv_bfloat16, "bf16", 128, 64, 64, 65, 66, 67, 68, 69, 70)
RAVEN_WGMMA(__half, "f16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
RAVEN_WGMMA(__half, "f16", 80, 40, 40, 41, 42, 43, 44, 45, 46)
RAVEN_WGMMA(__half, "f16", 128, 64, 64, 65, 66, 67, 68, 69, 70)

#undef RAVEN_WGMMA
#undef RAVEN_REGISTERS_32
#undef RAVEN_REGISTERS_40
#undef RAVEN_REGISTERS_64
#undef RAVEN_BIND_8
#undef RAVEN_BIND_32
#undef RAVEN_BIND_40
#undef RAVEN_BIND_64

// Two neighbouring elements of an operand in registers.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    uint32_t word;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
    }
    return word;
}

// Shared-memory operand in the 128-byte swizzle that TMA writes: panels of 64 columns, 128 bytes a row.
// K-major (rows are the operand's M or N): neighbouring groups of 8 rows are 1,024 bytes apart; a k16 step is 32 bytes.
__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// MN-major (rows are the operand's K, transposed by the instruction): panels are `panel_bytes` apart; a k16 step is
// 16 rows, 2,048 bytes.
__device__ __forceinline__ uint64_t descriptor_mn_major(uint32_t address, uint32_t panel_bytes) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(panel_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

// Descriptors count in units of 16 bytes.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

// The assembler moves a wait for a product in front of arithmetic that was meant to overlap it. Here it cannot: whether
// the (never reached) barrier is arrived at depends on that arithmetic's results, and barriers keep their place.
__device__ __forceinline__ void compute_before_waiting(float result, float other) {
    asm volatile(
        "{\n.reg .pred p, q;\n"
        "setp.eq.f32 p, %0, 0fBF800000;\n"
        "setp.eq.and.f32 q, %1, 0fBF800000, p;\n"
        "@q bar.arrive 15, 128;\n}\n" ::"f"(result),
        "f"(other)
        : "memory");
}

// Keeps the compiler from moving reads and writes of accumulators across the asynchronous products.
template <int COUNT>
__device__ __forceinline__ void pin(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

}  // namespace raven
