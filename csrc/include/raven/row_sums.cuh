// Elementwise work on three equally shaped tensors, and sums of it over rows, in one launch and in a fixed order.
//
// A tensor is seen as [B, C, F, plane]; a row is a chunk of frames of one sample, and a run is what a row has in one
// channel: contiguous memory. A block sums one piece of a run into its own cell. The block that finishes a row last, by
// an integer counter, adds the row's cells in their order. Pieces follow from the length of a run alone, and a thread
// takes the same elements whatever their alignment, so a row's bits depend neither on the batch nor on the addresses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace raven::rows {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 4;                 // neighbouring elements of a thread
constexpr int kStep = kThreads * kVector;  // elements that a block takes at once
constexpr int kUnroll = 2;                 // steps whose loads are on their way together
constexpr int kMinBlocks = 4;              // resident on a multiprocessor: 64 registers a thread
constexpr int kScaleSteps = 4;             // all that a block takes at once where nothing is summed
constexpr int kScaleBlocks = 2048;         // at most, where a block may come back for more

// The shape of the tensors and of the work, the same for every block.
struct Geometry {
    int samples, channels, frames, chunks;
    int chunk_frames;    // frames of every chunk, where no borders are given
    int64_t plane;       // elements of one frame of one channel
    const int* borders;  // [chunks + 1]: first frame of each chunk, then the end; null for equal chunks
    int piece, splits;   // elements of a piece, a multiple of kStep; pieces of the longest run

    __host__ __device__ int rows() const { return samples * chunks; }
    __host__ __device__ int cells() const { return channels * splits; }  // of one row
    unsigned blocks() const { return static_cast<unsigned>(rows()) * cells(); }
};

// A level per row: a number, or a table [B, chunks] of any strides.
struct Level {
    const float* table;
    int64_t sample_stride, chunk_stride;
    float value;

    __device__ float at(int sample, int chunk) const {
        return table == nullptr ? value : __ldg(table + sample * sample_stride + chunk * chunk_stride);
    }
};

// Where a block works: elements [begin, end) of the run that starts at element `start` of the tensor.
struct Piece {
    int sample, chunk, row, cell, frames, begin, end;
    int64_t start;
};

__device__ inline Piece locate(const Geometry& g, unsigned block) {
    Piece p;
    const unsigned split = block % g.splits;
    unsigned rest = block / g.splits;
    p.chunk = rest % g.chunks;
    rest /= g.chunks;
    const unsigned channel = rest % g.channels;
    p.sample = rest / g.channels;
    const int first = g.borders == nullptr ? p.chunk * g.chunk_frames : __ldg(g.borders + p.chunk);
    p.frames = g.borders == nullptr ? g.chunk_frames : __ldg(g.borders + p.chunk + 1) - first;
    p.start = ((static_cast<int64_t>(p.sample) * g.channels + channel) * g.frames + first) * g.plane;
    const int length = static_cast<int>(p.frames * g.plane);
    p.begin = min(static_cast<int>(split) * g.piece, length);
    p.end = min(p.begin + g.piece, length);
    p.row = p.sample * g.chunks + p.chunk;
    p.cell = channel * g.splits + split;
    return p;
}

// For what follows a pass over the same memory: the end is what that left in the L2 cache.
__device__ inline Piece locate_from_the_end(const Geometry& g) { return locate(g, gridDim.x - 1 - blockIdx.x); }

enum class Type : int { kFloat = 0, kBfloat16 = 1, kHalf = 2 };

// The type in which a gradient waits to be scaled: float16 has not the range for one without its factor.
inline Type gradient_type(Type type) { return type == Type::kHalf ? Type::kFloat : type; }

__device__ inline float2 unpack(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ inline float2 unpack(__half2 x) { return __half22float2(x); }
__device__ inline void pack(float x, float y, __nv_bfloat162* out) { *out = __floats2bfloat162_rn(x, y); }
__device__ inline void pack(float x, float y, __half2* out) { *out = __floats2half2_rn(x, y); }

// Elements of one type, `Pair` the type of two of them, in memory that is aligned to four. gradient(data): the same
// for a waiting gradient of such elements.
template <typename Pair>
struct Aligned {
    static constexpr int kUnroll = rows::kUnroll;
    void* data;

    Aligned at(void* other) const { return {other}; }
    auto gradient(void* other) const {
        using Waiting = std::conditional_t<std::is_same_v<Pair, __half2>, float2, Pair>;
        return Aligned<Waiting>{other};
    }
    __device__ float4 load(int64_t i, int) const {
        const uint2 raw = static_cast<const uint2*>(data)[i / kVector];
        const float2 a = unpack(reinterpret_cast<const Pair&>(raw.x)), b = unpack(reinterpret_cast<const Pair&>(raw.y));
        return make_float4(a.x, a.y, b.x, b.y);
    }
    __device__ void store(int64_t i, int, float4 x) const {
        uint2 raw;
        pack(x.x, x.y, reinterpret_cast<Pair*>(&raw.x));
        pack(x.z, x.w, reinterpret_cast<Pair*>(&raw.y));
        static_cast<uint2*>(data)[i / kVector] = raw;
    }
};

template <>
struct Aligned<float2> {
    static constexpr int kUnroll = rows::kUnroll;
    void* data;

    Aligned at(void* other) const { return {other}; }
    Aligned gradient(void* other) const { return {other}; }
    __device__ float4 load(int64_t i, int) const { return static_cast<const float4*>(data)[i / kVector]; }
    __device__ void store(int64_t i, int, float4 x) const { static_cast<float4*>(data)[i / kVector] = x; }
};

// Elements of any type anywhere, one by one: odd sizes, views that start between two vectors, rare mixes of types.
struct Any {
    static constexpr int kUnroll = 1;
    void* data;
    Type type;

    Any at(void* other) const { return {other, type}; }
    Any gradient(void* other) const { return {other, gradient_type(type)}; }
    __device__ float element(int64_t i) const {
        if (type == Type::kFloat) return static_cast<const float*>(data)[i];
        const unsigned short raw = static_cast<const unsigned short*>(data)[i];
        return type == Type::kHalf ? __half2float(__ushort_as_half(raw)) : __bfloat162float(__ushort_as_bfloat16(raw));
    }
    __device__ void write(int64_t i, float x) const {
        if (type == Type::kFloat) {
            static_cast<float*>(data)[i] = x;
        } else {
            static_cast<unsigned short*>(data)[i] = type == Type::kHalf ? __half_as_ushort(__float2half_rn(x))
                                                                        : __bfloat16_as_ushort(__float2bfloat16_rn(x));
        }
    }
    __device__ float4 load(int64_t i, int count) const {
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        x.x = element(i);
        if (count > 1) x.y = element(i + 1);
        if (count > 2) x.z = element(i + 2);
        if (count > 3) x.w = element(i + 3);
        return x;
    }
    __device__ void store(int64_t i, int count, float4 x) const {
        write(i, x.x);
        if (count > 1) write(i + 1, x.y);
        if (count > 2) write(i + 2, x.z);
        if (count > 3) write(i + 3, x.w);
    }
};

// Calls body(position in the run, how many elements, v, x_t, x_s) for this thread's part of a piece, in rising order.
// Elements beyond the end arrive as zeros. Loads of kUnroll steps are on their way at once.
template <typename V, typename X, typename Body>
__device__ void walk(const Piece& p, V v, X x_t, X x_s, Body body) {
    constexpr int kUnroll = V::kUnroll;
    const int mine = threadIdx.x * kVector;
    int base = p.begin;
    for (; base + kUnroll * kStep <= p.end; base += kUnroll * kStep) {
        float4 a[kUnroll], b[kUnroll], c[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t i = p.start + base + u * kStep + mine;
            a[u] = v.load(i, kVector);
            b[u] = x_t.load(i, kVector);
            c[u] = x_s.load(i, kVector);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) body(base + u * kStep + mine, kVector, a[u], b[u], c[u]);
    }
    for (base += mine; base < p.end; base += kStep) {
        const int count = min(kVector, p.end - base);
        const int64_t i = p.start + base;
        body(base, count, v.load(i, count), x_t.load(i, count), x_s.load(i, count));
    }
}

// Sum over the block, in thread 0; a tree, so the order is fixed.
__device__ inline float block_sum(float x) {
    __shared__ float warps[kWarps];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x < 32) {
        x = threadIdx.x < kWarps ? warps[threadIdx.x] : 0.0f;
#pragma unroll
        for (int offset = kWarps / 2; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
    }
    return x;
}

// True, in every thread, in the block that arrives last of `arrivals`: it then sees what thread 0 of each wrote before.
// The counter is zero again afterwards, for the next launch.
__device__ inline bool last_to_arrive(unsigned* counter, unsigned arrivals) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(counter, 1u) == arrivals - 1;
        if (last) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// Adds this block's sum to its row; in the block that completes the row, thread 0 gets the row's sum. Everybody learns
// whether this block is that one.
__device__ inline bool row_sum(const Geometry& g, const Piece& p, float x, float* partial, unsigned* counters,
                               float* sum) {
    x = block_sum(x);
    const int cells = g.cells();
    float* row = partial + static_cast<int64_t>(p.row) * cells;
    if (threadIdx.x == 0) row[p.cell] = x;
    if (!last_to_arrive(counters + p.row, cells)) return false;
    x = 0.0f;
    for (int i = threadIdx.x; i < cells; i += kThreads) x += __ldcg(row + i);
    *sum = block_sum(x);
    return true;
}

// Three tensors in memory, as a launch gets them.
struct Inputs {
    const void *v, *x_t, *x_s;
    Type v_type, x_t_type, x_s_type;
};

inline bool aligned(const void* data, Type type) {
    return reinterpret_cast<uintptr_t>(data) % (type == Type::kFloat ? 16 : 8) == 0;
}

// Whether every run starts at a vector's border.
inline bool vectors(const Inputs& in, const Geometry& g) {
    return g.plane % kVector == 0 && aligned(in.v, in.v_type) && aligned(in.x_t, in.x_t_type) &&
           aligned(in.x_s, in.x_s_type);
}

template <typename Use>
void with_reader(void* data, Type type, Use use) {
    switch (type) {
        case Type::kFloat:
            return use(Aligned<float2>{data});
        case Type::kBfloat16:
            return use(Aligned<__nv_bfloat162>{data});
        case Type::kHalf:
            return use(Aligned<__half2>{data});
    }
}

// Calls launch(v, x_t, x_s) with readers of these tensors, of vectors if `vectors`.
template <typename Launch>
void with_readers(const Inputs& in, bool vectors, Launch launch) {
    void *v = const_cast<void*>(in.v), *x_t = const_cast<void*>(in.x_t), *x_s = const_cast<void*>(in.x_s);
    if (!vectors || in.x_t_type != in.x_s_type) {
        return launch(Any{v, in.v_type}, Any{x_t, in.x_t_type}, Any{x_s, in.x_s_type});
    }
    with_reader(v, in.v_type, [&](auto v_reader) {
        with_reader(x_t, in.x_t_type, [&](auto x_t_reader) { launch(v_reader, x_t_reader, x_t_reader.at(x_s)); });
    });
}

}  // namespace raven::rows
