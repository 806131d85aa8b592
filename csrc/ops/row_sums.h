// From PyTorch's tensors to the arguments of row_sums.cuh, for the ops that share them.
#pragma once

#include "interface.h"
#include "raven/row_sums.cuh"

namespace raven {

inline rows::Type row_type(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return rows::Type::kFloat;
        case ScalarType::BFloat16:
            return rows::Type::kBfloat16;
        default:
            return rows::Type::kHalf;
    }
}

inline rows::Inputs row_inputs(const Tensor& v, const Tensor& x_t, const Tensor& x_s) {
    return {v.data_ptr(), x_t.data_ptr(), x_s.data_ptr(), row_type(v), row_type(x_t), row_type(x_s)};
}

inline rows::Geometry row_geometry(const Tensor& v, int64_t channels, int64_t frames, int64_t chunks,
                                   const std::optional<Tensor>& borders, int64_t piece, int64_t splits) {
    rows::Geometry g;
    g.samples = static_cast<int>(v.size(0));
    g.channels = static_cast<int>(channels);
    g.frames = static_cast<int>(frames);
    g.chunks = static_cast<int>(chunks);
    g.chunk_frames = static_cast<int>(frames / chunks);
    g.plane = v.numel() / (v.size(0) * channels * frames);
    g.borders = pointer<int>(borders);
    g.piece = static_cast<int>(piece);
    g.splits = static_cast<int>(splits);
    return g;
}

// A float32 table of no dimension, [B] or [B, chunks], of any strides; without one the number.
inline rows::Level row_level(const std::optional<Tensor>& table, double value) {
    if (!table.has_value()) return {nullptr, 0, 0, static_cast<float>(value)};
    const int64_t dims = table->dim();
    return {pointer<float>(table), dims > 0 ? table->stride(0) : 0, dims > 1 ? table->stride(1) : 0, 0.0f};
}

}  // namespace raven
