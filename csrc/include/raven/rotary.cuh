// Angles of 3-D rotary positions, exact at any int32 position without a table of positions.
//
// A frequency is stored in turns as a 64-bit fixed point fraction; an integer product that wraps around is exactly the
// angle modulo one turn. As kernels/qk_norm_rope.py.
#pragma once

#include <cstdint>

namespace raven {

// (frame, row, column) of a token.
struct Position {
    int32_t axis[3];
};

__device__ inline Position load_position(const int32_t* p) { return {{p[0], p[1], p[2]}}; }

// Cosine and sine of an angle in 2^-32 turns, to 3e-8.
__device__ inline void cos_sin(uint32_t turns, float& cos, float& sin) {
    const int32_t quarter = static_cast<int32_t>(turns + (1u << 29)) >> 30;  // the nearest quarter turn, may wrap to -2
    const auto rest = static_cast<int32_t>(turns - (static_cast<uint32_t>(quarter) << 30));
    const float angle = static_cast<float>(rest) * 1.4629180792671596e-09f;  // 2 pi / 2^32: within pi / 4
    const float square = angle * angle;
    // Taylor series; the next terms are below 3e-8 of the result at pi / 4.
    float s = fmaf(2.7557319223985893e-06f, square, -1.984126984126984e-04f);
    s = fmaf(fmaf(s, square, 8.333333333333333e-03f), square, -0.16666666666666666f);
    s = fmaf(s * square, angle, angle);
    float c = fmaf(2.48015873015873e-05f, square, -1.388888888888889e-03f);
    c = fmaf(fmaf(c, square, 4.1666666666666664e-02f), square, -0.5f);
    c = fmaf(c, square, 1.0f);
    const bool odd = quarter & 1;
    cos = odd ? s : c;
    sin = odd ? c : s;
    if ((quarter + 1) & 2) cos = -cos;
    if (quarter & 2) sin = -sin;
}

// The same to 5e-7, with a third of the instructions: for results of 8 or 11 bits.
__device__ inline void cos_sin_short(uint32_t turns, float& cos, float& sin) {
    const float angle = static_cast<float>(static_cast<int32_t>(turns)) * 1.4629180792671596e-09f;  // within pi
    cos = __cosf(angle);
    sin = __sinf(angle);
}

constexpr int kMostPairs = 128;

// Frequencies of all pairs in shared memory: [dim / 2], in turns times 2^64. Visible after the next barrier.
__device__ inline void stage_frequencies(uint64_t* shared, const int64_t* frequencies, int dim) {
    for (int i = threadIdx.x; i < dim / 2; i += blockDim.x) shared[i] = static_cast<uint64_t>(frequencies[i]);
}

// The four channel pairs that one thread turns, the same ones in every head it holds.
struct FourPairs {
    const uint64_t* frequencies;  // of the first of the four
    int until_row, until_column;  // of the four, those before turn with the frame, and with the row

    __device__ FourPairs(const uint64_t* all, int pair, int dim)
        : frequencies(all + pair),
          until_row(dim / 2 - 2 * (dim / 2 / 3) - pair),
          until_column(dim / 2 - dim / 2 / 3 - pair) {}

    template <bool kShort>
    __device__ void at(const Position& p, float (&cos)[4], float (&sin)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int32_t position = i < until_row ? p.axis[0] : i < until_column ? p.axis[1] : p.axis[2];
            const uint64_t turns = static_cast<uint64_t>(static_cast<int64_t>(position)) * frequencies[i];
            if constexpr (kShort) {
                cos_sin_short(static_cast<uint32_t>(turns >> 32), cos[i], sin[i]);
            } else {
                cos_sin(static_cast<uint32_t>(turns >> 32), cos[i], sin[i]);
            }
        }
    }
};

// Turn the interleaved pairs of eight channels.
__device__ inline void rotate(float (&x)[8], const float (&cos)[4], const float (&sin)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = fmaf(even, cos[i], -odd * sin[i]);
        x[2 * i + 1] = fmaf(odd, cos[i], even * sin[i]);
    }
}

// The same turned back.
__device__ inline void rotate_back(float (&x)[8], const float (&cos)[4], const float (&sin)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = fmaf(even, cos[i], odd * sin[i]);
        x[2 * i + 1] = fmaf(odd, cos[i], -even * sin[i]);
    }
}

}  // namespace raven
