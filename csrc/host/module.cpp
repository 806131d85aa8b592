// The planner as the Python module raven._C. Arguments were checked by raven/planner.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <utility>
#include <vector>

#include "raven/planner.h"

namespace py = pybind11;

namespace {

using Int32Array = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

raven::SpansView view(const Int32Array& q_ranges, const Int32Array& kv_indptr, const Int32Array& kv_ranges) {
    return {reinterpret_cast<const raven::Range*>(q_ranges.data()), static_cast<std::size_t>(q_ranges.shape(0)),
            kv_indptr.data(), reinterpret_cast<const raven::Range*>(kv_ranges.data())};
}

// A numpy array over the vector's own memory: [n] for numbers, [n, width] for structs of `width` numbers.
template <typename T>
Int32Array to_numpy(std::vector<T>&& values) {
    static_assert(sizeof(T) % sizeof(int32_t) == 0);
    constexpr py::ssize_t width = sizeof(T) / sizeof(int32_t);
    std::vector<py::ssize_t> shape = {static_cast<py::ssize_t>(values.size())};
    if (width > 1) shape.push_back(width);
    if (values.empty()) return Int32Array(shape);  // an empty vector may have no memory to share
    auto owner = std::make_unique<std::vector<T>>(std::move(values));
    const auto* data = reinterpret_cast<const int32_t*>(owner->data());
    py::capsule free_owner(owner.get(), [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
    owner.release();
    return Int32Array(shape, data, free_owner);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled work planner; raven.planner is its documented face.";
    m.def("plan", [](const Int32Array& q_ranges, const Int32Array& kv_indptr, const Int32Array& kv_ranges,
                     int32_t block_q, int32_t block_k) {
        raven::TilePlan out = raven::plan(view(q_ranges, kv_indptr, kv_ranges), block_q, block_k);
        return py::make_tuple(to_numpy(std::move(out.q_tiles)), to_numpy(std::move(out.full_indptr)),
                              to_numpy(std::move(out.full_starts)), to_numpy(std::move(out.tail_indptr)),
                              to_numpy(std::move(out.tails)));
    });
    m.def("transpose", [](const Int32Array& q_ranges, const Int32Array& kv_indptr, const Int32Array& kv_ranges) {
        raven::Spans out = raven::transpose(view(q_ranges, kv_indptr, kv_ranges));
        return py::make_tuple(to_numpy(std::move(out.q_ranges)), to_numpy(std::move(out.kv_indptr)),
                              to_numpy(std::move(out.kv_ranges)));
    });
    m.def("balance", [](const Int32Array& costs, int32_t workers) {
        raven::Shares out = raven::balance(costs.data(), static_cast<std::size_t>(costs.size()), workers);
        return py::make_tuple(to_numpy(std::move(out.indptr)), to_numpy(std::move(out.order)));
    });
}
