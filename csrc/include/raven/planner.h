// Host-side work planner: spans into tile lists. raven/planner.py states the rules and computes the same values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace raven {

// [begin, end) of queries or keys.
struct Range {
    int32_t begin;
    int32_t end;
};

inline bool operator==(Range a, Range b) { return a.begin == b.begin && a.end == b.end; }

// Borrowed spans: query range i sees kv_ranges[kv_indptr[i]] up to, not including, kv_ranges[kv_indptr[i + 1]].
struct SpansView {
    const Range* q_ranges;  // [lists], sorted and disjoint
    std::size_t lists;
    const int32_t* kv_indptr;  // [lists + 1]
    const Range* kv_ranges;    // disjoint within one list, in any order
};

struct Spans {
    std::vector<Range> q_ranges;
    std::vector<int32_t> kv_indptr;
    std::vector<Range> kv_ranges;

    SpansView view() const { return {q_ranges.data(), q_ranges.size(), kv_indptr.data(), kv_ranges.data()}; }
};

// At most block_q queries of one query range; `cost` is the number of keys they see.
struct QueryTile {
    int32_t begin;
    int32_t length;
    int32_t list;
    int32_t cost;
};

// What is left of a key range after its full tiles.
struct Tail {
    int32_t start;
    int32_t length;
};

struct TilePlan {
    std::vector<QueryTile> q_tiles;  // costliest first
    std::vector<int32_t> full_indptr;
    std::vector<int32_t> full_starts;
    std::vector<int32_t> tail_indptr;
    std::vector<Tail> tails;
};

// Worker w runs the tiles order[indptr[w]] up to, not including, order[indptr[w + 1]].
struct Shares {
    std::vector<int32_t> indptr;
    std::vector<int32_t> order;
};

TilePlan plan(const SpansView& spans, int32_t block_q, int32_t block_k);

// The same pairs seen from the keys: the result's "queries" are keys, and its "keys" are queries.
Spans transpose(const SpansView& spans);

// Costliest tile first, always to the least loaded worker; ties keep their order, equal loads go to the lowest worker.
Shares balance(const int32_t* costs, std::size_t tiles, int32_t workers);

}  // namespace raven
