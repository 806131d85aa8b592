// Random spans against a dense count of (query, key) pairs, and hand-made cases. Prints what failed; exit code 1 then.
#include "raven/planner.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

namespace {

int failures = 0;

void check(bool holds, const std::string& what) {
    if (holds) return;
    ++failures;
    std::printf("FAILED: %s\n", what.c_str());
}

constexpr int kSize = 48;
using Dense = std::vector<int>;  // [kSize * kSize], how often each (query, key) is covered

void cover(Dense& dense, raven::Range queries, raven::Range keys) {
    for (int q = queries.begin; q < queries.end; ++q)
        for (int k = keys.begin; k < keys.end; ++k) ++dense[q * kSize + k];
}

Dense dense_of(const raven::SpansView& spans) {
    Dense dense(kSize * kSize);
    for (std::size_t i = 0; i < spans.lists; ++i)
        for (int r = spans.kv_indptr[i]; r < spans.kv_indptr[i + 1]; ++r)
            cover(dense, spans.q_ranges[i], spans.kv_ranges[r]);
    return dense;
}

Dense dense_of(const raven::TilePlan& plan, int block_k) {
    Dense dense(kSize * kSize);
    for (const raven::QueryTile& tile : plan.q_tiles) {
        const raven::Range queries{tile.begin, tile.begin + tile.length};
        for (int f = plan.full_indptr[tile.list]; f < plan.full_indptr[tile.list + 1]; ++f)
            cover(dense, queries, {plan.full_starts[f], plan.full_starts[f] + block_k});
        for (int t = plan.tail_indptr[tile.list]; t < plan.tail_indptr[tile.list + 1]; ++t)
            cover(dense, queries, {plan.tails[t].start, plan.tails[t].start + plan.tails[t].length});
    }
    return dense;
}

Dense flipped(const Dense& dense) {
    Dense out(kSize * kSize);
    for (int q = 0; q < kSize; ++q)
        for (int k = 0; k < kSize; ++k) out[k * kSize + q] = dense[q * kSize + k];
    return out;
}

// Sorted, disjoint, sometimes empty, sometimes touching.
std::vector<raven::Range> random_ranges(std::mt19937& random, int most) {
    std::vector<int> cuts(2 * (random() % (most + 1)));
    for (int& cut : cuts) cut = static_cast<int>(random() % (kSize + 1));
    std::sort(cuts.begin(), cuts.end());
    std::vector<raven::Range> ranges;
    for (std::size_t i = 0; i < cuts.size(); i += 2) ranges.push_back({cuts[i], cuts[i + 1]});
    return ranges;
}

raven::Spans random_spans(std::mt19937& random) {
    raven::Spans spans;
    spans.q_ranges = random_ranges(random, 6);
    spans.kv_indptr.push_back(0);
    for (std::size_t i = 0; i < spans.q_ranges.size(); ++i) {
        std::vector<raven::Range> keys = random_ranges(random, 4);
        std::shuffle(keys.begin(), keys.end(), random);
        spans.kv_ranges.insert(spans.kv_ranges.end(), keys.begin(), keys.end());
        spans.kv_indptr.push_back(static_cast<int>(spans.kv_ranges.size()));
    }
    return spans;
}

void test_random_spans() {
    std::mt19937 random(7);
    for (int round = 0; round < 3000; ++round) {
        const std::string name = "random spans, round " + std::to_string(round);
        const raven::Spans spans = random_spans(random);
        const Dense dense = dense_of(spans.view());
        const int block_q = 1 + random() % 9, block_k = 1 + random() % 9;
        const raven::TilePlan plan = raven::plan(spans.view(), block_q, block_k);
        check(dense_of(plan, block_k) == dense, name + ": tiles cover every pair once");
        for (const raven::Tail& tail : plan.tails) {
            check(0 < tail.length && tail.length < block_k, name + ": tail length");
        }
        for (std::size_t i = 0; i < plan.q_tiles.size(); ++i) {
            check(0 < plan.q_tiles[i].length && plan.q_tiles[i].length <= block_q, name + ": query tile length");
            check(i == 0 || plan.q_tiles[i - 1].cost >= plan.q_tiles[i].cost, name + ": costliest first");
        }
        const raven::Spans turned = raven::transpose(spans.view());
        check(dense_of(turned.view()) == flipped(dense), name + ": transposed spans hold the same pairs");
        const raven::TilePlan turned_plan = raven::plan(turned.view(), block_q, block_k);
        check(dense_of(turned_plan, block_k) == flipped(dense), name + ": transposed tiles cover every pair once");
    }
}

void test_neighbours_merge() {
    // Two touching query ranges see keys 0..10; the second one also sees the keys 10..20, cut into two ranges.
    const raven::Spans spans{{{0, 4}, {4, 8}}, {0, 1, 4}, {{0, 10}, {0, 10}, {10, 15}, {15, 20}}};
    const raven::Spans turned = raven::transpose(spans.view());
    check(turned.q_ranges == std::vector<raven::Range>({{0, 10}, {10, 20}}), "equal neighbours are one key range");
    check(turned.kv_ranges == std::vector<raven::Range>({{0, 8}, {4, 8}}), "touching query ranges merge");
    check(turned.kv_indptr == std::vector<int32_t>({0, 1, 2}), "one merged query range per key range");
}

void test_query_without_keys_keeps_its_tiles() {
    const raven::Spans spans{{{3, 9}}, {0, 0}, {}};
    const raven::TilePlan plan = raven::plan(spans.view(), 4, 4);
    check(plan.q_tiles.size() == 2 && plan.q_tiles[1].begin == 7 && plan.q_tiles[1].length == 2, "tiles without keys");
    check(plan.full_starts.empty() && plan.tails.empty(), "no key tiles without keys");
}

void test_ends_near_the_largest_int32() {
    const int32_t most = 2147483647;
    const raven::Spans spans{{{most - 3, most}}, {0, 1}, {{most - 9, most}}};
    const raven::TilePlan plan = raven::plan(spans.view(), 4, 4);
    check(plan.full_starts == std::vector<int32_t>({most - 9, most - 5}), "full tiles at the end of int32");
    check(plan.tails.size() == 1 && plan.tails[0].start == most - 1, "tail at the end of int32");
}

void test_balance() {
    const std::vector<int32_t> costs = {3, 1, 4, 1, 5, 9, 2, 6};
    const raven::Shares shares = raven::balance(costs.data(), costs.size(), 3);
    check(shares.indptr == std::vector<int32_t>({0, 2, 5, 8}), "how many tiles each worker gets");
    check(shares.order == std::vector<int32_t>({5, 6, 7, 0, 1, 4, 2, 3}), "which tiles each worker gets");
    check(raven::balance(nullptr, 0, 2).indptr == std::vector<int32_t>({0, 0, 0}), "no tiles");
}

}  // namespace

int main() {
    test_random_spans();
    test_neighbours_merge();
    test_query_without_keys_keeps_its_tiles();
    test_ends_near_the_largest_int32();
    test_balance();
    if (failures == 0) std::printf("planner: all checks hold\n");
    return failures == 0 ? 0 : 1;
}
