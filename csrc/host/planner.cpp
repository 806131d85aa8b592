#include "raven/planner.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>

namespace raven {

TilePlan plan(const SpansView& spans, int32_t block_q, int32_t block_k) {
    TilePlan out;
    out.full_indptr.reserve(spans.lists + 1);
    out.tail_indptr.reserve(spans.lists + 1);
    out.full_indptr.push_back(0);
    out.tail_indptr.push_back(0);
    for (std::size_t list = 0; list < spans.lists; ++list) {
        int32_t keys = 0;
        for (int32_t r = spans.kv_indptr[list]; r < spans.kv_indptr[list + 1]; ++r) {
            const Range range = spans.kv_ranges[r];
            keys += range.end - range.begin;
            // `end - start` rather than `start + block_k`, which could pass the largest int32.
            int32_t start = range.begin;
            for (; range.end - start >= block_k; start += block_k) out.full_starts.push_back(start);
            if (start < range.end) out.tails.push_back({start, range.end - start});
        }
        out.full_indptr.push_back(static_cast<int32_t>(out.full_starts.size()));
        out.tail_indptr.push_back(static_cast<int32_t>(out.tails.size()));

        const Range queries = spans.q_ranges[list];
        for (int32_t left = queries.end - queries.begin; left > 0; left -= std::min(left, block_q)) {
            out.q_tiles.push_back({queries.end - left, std::min(left, block_q), static_cast<int32_t>(list), keys});
        }
    }
    std::stable_sort(out.q_tiles.begin(), out.q_tiles.end(),
                     [](const QueryTile& a, const QueryTile& b) { return a.cost > b.cost; });
    return out;
}

Spans transpose(const SpansView& spans) {
    // Between two neighbouring borders every key is seen by the same queries.
    std::vector<int32_t> borders;
    for (std::size_t list = 0; list < spans.lists; ++list) {
        if (spans.q_ranges[list].begin == spans.q_ranges[list].end) continue;
        for (int32_t r = spans.kv_indptr[list]; r < spans.kv_indptr[list + 1]; ++r) {
            if (spans.kv_ranges[r].begin == spans.kv_ranges[r].end) continue;
            borders.push_back(spans.kv_ranges[r].begin);
            borders.push_back(spans.kv_ranges[r].end);
        }
    }
    std::sort(borders.begin(), borders.end());
    borders.erase(std::unique(borders.begin(), borders.end()), borders.end());
    const auto interval_of = [&borders](int32_t key) {
        return std::lower_bound(borders.begin(), borders.end(), key) - borders.begin();
    };

    // Query ranges are sorted, so a visitor can only touch the one recorded last.
    std::vector<std::vector<Range>> visits(borders.size());
    for (std::size_t list = 0; list < spans.lists; ++list) {
        const Range queries = spans.q_ranges[list];
        if (queries.begin == queries.end) continue;
        for (int32_t r = spans.kv_indptr[list]; r < spans.kv_indptr[list + 1]; ++r) {
            const Range keys = spans.kv_ranges[r];
            if (keys.begin == keys.end) continue;
            const auto last = interval_of(keys.end);
            for (auto interval = interval_of(keys.begin); interval < last; ++interval) {
                std::vector<Range>& seen_by = visits[interval];
                if (!seen_by.empty() && seen_by.back().end == queries.begin) {
                    seen_by.back().end = queries.end;
                } else {
                    seen_by.push_back(queries);
                }
            }
        }
    }

    Spans out;
    out.kv_indptr.push_back(0);
    for (std::size_t i = 0; i + 1 < borders.size(); ++i) {
        if (visits[i].empty()) continue;
        if (i > 0 && visits[i] == visits[i - 1]) {
            out.q_ranges.back().end = borders[i + 1];
            continue;
        }
        out.q_ranges.push_back({borders[i], borders[i + 1]});
        out.kv_ranges.insert(out.kv_ranges.end(), visits[i].begin(), visits[i].end());
        out.kv_indptr.push_back(static_cast<int32_t>(out.kv_ranges.size()));
    }
    return out;
}

Shares balance(const int32_t* costs, std::size_t tiles, int32_t workers) {
    std::vector<int32_t> by_cost(tiles);
    std::iota(by_cost.begin(), by_cost.end(), 0);
    std::stable_sort(by_cost.begin(), by_cost.end(), [costs](int32_t a, int32_t b) { return costs[a] > costs[b]; });

    using Load = std::pair<int64_t, int32_t>;  // load, worker
    std::priority_queue<Load, std::vector<Load>, std::greater<Load>> loads;
    for (int32_t worker = 0; worker < workers; ++worker) loads.push({0, worker});
    std::vector<std::vector<int32_t>> shares(workers);
    for (const int32_t tile : by_cost) {
        const Load least = loads.top();
        loads.pop();
        loads.push({least.first + costs[tile], least.second});
        shares[least.second].push_back(tile);
    }

    Shares out;
    out.indptr.push_back(0);
    out.order.reserve(tiles);
    for (const std::vector<int32_t>& share : shares) {
        out.order.insert(out.order.end(), share.begin(), share.end());
        out.indptr.push_back(static_cast<int32_t>(out.order.size()));
    }
    return out;
}

}  // namespace raven
