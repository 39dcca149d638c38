// Attention over a paged cache of keys and values: decode, verify and prefill run the same steps, so they have the same
// bits.
//
// A query's softmax runs through blocks of 48 keys within partitions of 576, both counted from the start of its
// sequence, and partitions are put together in order; keys behind a query's own are left out, not masked. So the bits of
// a query's result do not depend on the other queries, and one long sequence still occupies many threads.
//
// Scores of bfloat16 come from dot products of pairs where the processor has them; weights and values are float32. With AMX
// attention_in_tiles.h computes bfloat16.
//
// With 8 query heads a key-value head, float32 has 4 vector operations a vector of the cache and query head: at bfloat16
// a decode is bound by them as much as by the memory. So that the times do not add up, the keys and values of the next
// step are fetched in step with the operations. The cache is read as it lies: two bfloat16 in 32 bits are two floats after
// a shift and a mask, so that queries and results are kept in the order even elements, odd elements.
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "attention_in_tiles.h"
#include "attention_work.h"
#include "kv_pages.h"

namespace qnext {

namespace {

constexpr int64_t kSteps = Vec::size == 16 ? 3 : 1;  // that a block takes of one token

// The softmax of a tile over some of its keys: the largest score, Σ e^(score − largest), and the values weighted so.
struct Softmax {
    static int64_t floats(const Shape& s, int64_t tokens) { return tokens * (2 * s.lanes + s.group * s.width); }
    Softmax(float* memory, const Shape& s, int64_t tokens)
        : largest(memory), total(memory + tokens * s.lanes), values(memory + 2 * tokens * s.lanes),
          end(memory + floats(s, tokens)) {}
    void clear() const {
        std::fill(largest, total, -std::numeric_limits<float>::infinity());
        std::fill(total, end, 0.0f);
    }
    float *largest, *total;  // [tokens, lanes]
    float *values, *end;     // [tokens, group, width], in the order of attention_tile.h
};

// One thread's.
//
// Three blocks are on their way at a time: of the first the keys meet the queries, of the second the scores become weights,
// a few between the products of others, so that these cover the latency, and of the third the values are weighted. With
// AVX-512 one token goes through a third of a block at a step: what is read in a step is fetched in the step before, and
// stays in the first cache.
template <class T>
class Worker {
  public:
    static constexpr int64_t kMostRows = 256;

    static int64_t floats(const Shape& s, int64_t tokens) { return Softmax::floats(s, tokens); }

    Worker(const PagedAttention& p, const Shape& s)
        : p(p), s(s), queries(scratch<Element>(s.tokens * s.group * s.width)),
          copy(scratch<T>(s.width == p.head_dim ? 0 : 2 * kBlock * s.width)), nothing(scratch<T>(s.width)),
          memory(scratch<float>(3 * Softmax::floats(s, s.tokens))),
          sums(scratch<float>(2 * s.tokens * s.lanes)) {
        for (Block& block : blocks) {
            block.weights = scratch<float>(s.tokens * kBlock * s.lanes);
            block.factors = scratch<float>(s.tokens * s.lanes);
        }
        std::fill_n(nothing.get(), s.width, T{});
        ahead.bytes = p.head_dim * int64_t(sizeof(T));
    }

    // `next`: what this thread computes then, of which some is fetched; without a tile where that is not known.
    void whole(const Tile& tile, const Parts& next) {
        begin(tile);
        const Softmax all = softmax(0);
        attend({&tile, 0, tile.parts()}, next, all);
        finish(all);
    }

    void part(const Parts& part, const Parts& next, float* result) {
        begin(*part.tile);
        attend(part, next, Softmax(result, s, t.tokens));
    }

    void finish_parts(const Tile& tile, float* parts) {
        t = tile;
        const Softmax all(parts, s, t.tokens);
        for (int64_t i = 1; i < t.parts(); ++i) join(i, Softmax(parts + i * Softmax::floats(s, t.tokens), s, t.tokens), all);
        finish(all);
    }

  private:
    using Element = typename Scores<T>::Element;

    // The scores of a block, and then the weights of its values.
    struct Block {
        Scratch<float> weights, factors;  // [tokens, lanes / kRows, kBlock, kRows]; [tokens, lanes], of what was before

        float* weights_of(int64_t lane) const { return weights.get() + lane * kBlock; }
    };

    // Keys that token i of the tile sees, and those of `count` from `first` on.
    int64_t keys_of(int64_t i) const { return p.causal ? t.keys - (t.tokens - 1 - i) : t.keys; }
    int64_t seen(int64_t i, int64_t first, int64_t count) const {
        return std::clamp<int64_t>(keys_of(i) - first, 0, count);
    }

    const T* row(const void* data, int64_t token, int64_t token_stride, int64_t head_stride, int64_t g) const {
        return static_cast<const T*>(data) + token * token_stride + (t.kv_head * s.group + g) * head_stride;
    }

    Softmax softmax(int64_t i) const { return Softmax(memory.get() + i * Softmax::floats(s, s.tokens), s, t.tokens); }

    void begin(const Tile& tile) {
        t = tile;
        for (int64_t i = 0; i < t.tokens; ++i) {
            for (int64_t g = 0; g < s.group; ++g) {
                const T* from = row(p.q, t.token + i, p.q_token, p.q_head, g);
                const Strip to = strip(i, g);
                for (int64_t c = 0; c < s.width; c += kPair) {
                    Element* const at = queries.get() + to.begin + c * to.heads;
                    if constexpr (std::is_same_v<T, Element>) {
                        const int64_t count = std::min(kPair, p.head_dim - c);
                        std::fill(std::copy_n(from + c, count, at), at + kPair, T{});
                    } else {
                        load_pair(from, c, p.head_dim).store(at);
                    }
                }
            }
        }
    }

    // Where a head's queries and results are: kPair columns at `begin`, the next kPair `heads` times as far on.
    struct Strip {
        int64_t begin, heads;
    };
    Strip strip(int64_t i, int64_t g) const {
        const int64_t first = g / kRows * kRows;
        return {(i * s.group + first) * s.width + (g - first) * kPair, std::min<int64_t>(kRows, s.group - first)};
    }

    // Partitions of the tile that has begun to `all`.
    void attend(const Parts& parts, const Parts& next, const Softmax& all) {
        const int64_t begin = parts.begin(), end = parts.end(), steps = t.tokens == 1 ? kSteps : 1, size = kBlock / steps;
        const auto result = [&](int64_t block) {
            const int64_t part = block / kBlocks;
            return part == parts.first ? all : softmax(1 + part % 2);
        };
        Run<T> keys = run(Kind::keys, parts), values;
        const auto find = [&](int64_t step) {
            // Behind the last keys come the first ones of the next tile.
            if (step == end * steps) keys = run(Kind::keys, next);
            if (step == (begin + 2) * steps) values = run(Kind::values, parts);
            const T** const to = rows[step % 2];
            keys.next(size, to, nothing.get());
            values.next(size, to + size, nothing.get());
            to[2 * size] = nothing.get();
            return to;
        };
        const T* const* from = find(begin * steps);
        for (int64_t block = begin; block < end + 2; ++block) {
            const Block &scored = blocks[block % 3], &softened = blocks[(block + 2) % 3], &weighed = blocks[(block + 1) % 3];
            const bool softens = block > begin && block <= end, weighs = block > begin + 1;
            const Softmax to_softened = softens ? result(block - 1) : all, to_weighed = weighs ? result(block - 2) : all;
            if (softens && (block - 1 == begin || (block - 1) % kBlocks == 0)) to_softened.clear();
            for (int64_t n = 0; n < steps; ++n) {
                const T** const later = find(block * steps + n + 1);
                ahead.last = later + 2 * size;
                ahead.begin(later);
                const T* const* const read = s.width == p.head_dim ? from : pad(from, size);
                const int64_t at = n * size;
                if (block < end) score_keys(read, block * kBlock + at, size, scored, at);
                for (int64_t i = 0; i < t.tokens; ++i) {
                    const int64_t visible = softens ? seen(i, (block - 1) * kBlock, kBlock) : 0;
                    const int64_t count = weighs ? seen(i, (block - 2) * kBlock + at, size) : 0;
                    for (int64_t g = 0; g < s.group; g += kRows) {
                        const int64_t lane = i * s.lanes + g;
                        if (visible && n == 0) begin_softmax(lane, visible, softened, to_softened);
                        weigh(i, g, read + size, count, weighed, at, to_weighed,
                              soften(lane, visible - at, size, softened, at, to_softened));
                        if (visible && n + 1 == steps) end_softmax(lane, softened, to_softened);
                    }
                }
                from = later;
            }
            if (weighs && ((block - 1) % kBlocks == 0 || block == end + 1) && (block - 2) / kBlocks > parts.first)
                join((block - 2) / kBlocks, to_weighed, all);
        }
    }

    Run<T> run(Kind kind, const Parts& parts) const {
        if (!parts.tile) return {};
        const Tile& tile = *parts.tile;
        const int64_t first = parts.begin() * kBlock, last = std::min(parts.end() * kBlock, tile.keys);
        return {p, kind, tile.sequence, tile.kv_head, first, last - first};
    }

    // Keys and values with zeros behind their ends.
    const T* const* pad(const T* const* from, int64_t size) {
        T* to = copy.get();
        for (int64_t j = 0; j < 2 * size; ++j, to += s.width) {
            std::fill(std::copy_n(from[j], p.head_dim, to), to + s.width, T{});
            padded_rows[j] = to;
        }
        return padded_rows;
    }

    // The scores of keys `first` … `first` + `size`, which are `at` … of the block.
    void score_keys(const T* const* from, int64_t first, int64_t size, const Block& block, int64_t at) {
        const Vec scale = Vec::fill(float(p.scale * 1.4426950408889634));
        for (int64_t i = 0; i < t.tokens; ++i) {
            const int64_t count = seen(i, first, size);
            for (int64_t g = 0; g < s.group; g += kRows) {
                const Element* const q = queries.get() + (i * s.group + g) * s.width;
                float* const out = block.weights_of(i * s.lanes + g) + at * kRows;
                with_rows<kRows>(s.group - g, [&](auto heads) {
                    score<heads.value>(q, s.width, from, count, scale, out, i ? nullptr : &ahead);
                });
            }
        }
    }

    // The largest score of kRows heads; what was weighted by a smaller one gets a factor.
    void begin_softmax(int64_t lane, int64_t count, const Block& block, const Softmax& to) const {
        float *const scores = block.weights_of(lane), *const end = scores + count * kRows;
        // Behind the last key are weights of 0.
        constexpr int64_t together = 2 * kSoftened;
        std::fill(end, scores + (count + together - 1) / together * together * kRows, -std::numeric_limits<float>::infinity());
        const Vec before = load_twice(to.largest + lane);
        Vec tops[4] = {before, before, before, before};
        const float* at = scores;
        for (; at + 4 * Vec::size <= end; at += 4 * Vec::size) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) tops[k] = max(tops[k], Vec::load(at + k * Vec::size));
        }
        for (; at < end; at += Vec::size) tops[0] = max(tops[0], Vec::load(at));
        const Vec top = max(max(tops[0], tops[1]), max(tops[2], tops[3])), all = max(top, swapped(top));
        store_half(all, to.largest + lane);
        store_half(exp2(before - all), block.factors.get() + lane);
        Vec::zero().store(sums.get() + 2 * lane);
    }

    // Of `size` scores, those of `visible` keys.
    Soften soften(int64_t lane, int64_t visible, int64_t size, const Block& block, int64_t at, const Softmax& to) const {
        constexpr int64_t together = 2 * kSoftened;
        return {block.weights_of(lane) + at * kRows, (std::clamp<int64_t>(visible, 0, size) + together - 1) / together,
                to.largest + lane, sums.get() + 2 * lane};
    }

    void end_softmax(int64_t lane, const Block& block, const Softmax& to) const {
        const Vec sum = Vec::load(sums.get() + 2 * lane);
        float* const total = to.total + lane;
        store_half(fma(load_twice(total), load_twice(block.factors.get() + lane), sum + swapped(sum)), total);
    }

    // The values of `count` keys, which are `at` … of the block, and beside it others' softmax.
    void weigh(int64_t i, int64_t g, const T* const* values, int64_t count, const Block& block, int64_t at, const Softmax& to,
               Soften soften) {
        if (!count) return soften.all();
        const int64_t lane = i * s.lanes + g;
        with_rows<kRows>(s.group - g, [&](auto heads) {
            add_weighted<heads.value>(block.weights_of(lane) + at * kRows, at ? nullptr : block.factors.get() + lane, values,
                                      count, s.width, to.values + (i * s.group + g) * s.width, i ? nullptr : &ahead, soften);
        });
    }

    // Puts a partition's result behind that of the partitions before it.
    void join(int64_t part, const Softmax& from, const Softmax& to) const {
        for (int64_t i = 0; i < t.tokens; ++i) {
            if (keys_of(i) <= part * kPartition) continue;
            for (int64_t r = 0; r < s.group; ++r) {
                const int64_t at = i * s.lanes + r;
                const Strip row = strip(i, r);
                join_row(from.largest[at], from.total[at], from.values + row.begin, to.largest[at], to.total[at],
                         to.values + row.begin, row.heads);
            }
        }
    }

    void join_row(float largest, float total, const float* values, float& to_largest, float& to_total, float* to_values,
                  int64_t heads) const {
        const float top = std::max(to_largest, largest);
        const Vec old = exp2(Vec::fill(to_largest - top)), added = exp2(Vec::fill(largest - top));
        const Vec sum = fma(added, Vec::fill(total), old * Vec::fill(to_total));
        to_largest = top;
        float lanes[Vec::size];
        sum.store(lanes);
        to_total = lanes[0];
        for (int64_t c = 0; c < s.width * heads; c += kPair * heads) {
            for (int64_t half = c; half < c + kPair; half += Vec::size)
                fma(added, Vec::load(values + half), old * Vec::load(to_values + half)).store(to_values + half);
        }
    }

    void finish(const Softmax& all) const {
        for (int64_t i = 0; i < t.tokens; ++i) {
            for (int64_t g = 0; g < s.group; ++g) {
                const int64_t token = t.token + i;
                T* to = static_cast<T*>(p.out) + (token * p.heads + t.kv_head * s.group + g) * p.head_dim;
                const T* gate = p.gate ? row(p.gate, token, p.gate_token, p.gate_head, g) : nullptr;
                const Vec inverse = Vec::fill(1.0f / all.total[i * s.lanes + g]);
                const Strip values = strip(i, g);
                for (int64_t c = 0; c < s.width; c += kPair) {
                    Pair x = load_pair(all.values + values.begin + c * values.heads);
                    x = {x.first * inverse, x.second * inverse};
                    if (gate) {
                        const Pair y = load_pair(gate, c, p.head_dim);
                        x = {x.first * sigmoid(y.first), x.second * sigmoid(y.second)};
                    }
                    store_pair(x, to, c, p.head_dim);
                }
            }
        }
    }

    const PagedAttention& p;
    const Shape& s;
    Tile t;
    Scratch<Element> queries;
    Scratch<T> copy, nothing;
    Scratch<float> memory, sums;  // of the tile and of two partitions; of the weights of a block so far, [tokens, lanes, 2]
    Block blocks[3];
    // Of two steps: keys, values, and behind them memory that no one waits for.
    const T *rows[2][2 * kBlock + 1], *padded_rows[2 * kBlock];
    Ahead<T> ahead;
};

#if defined(QNEXT_TILES)
template <class T>
using WorkerOf = std::conditional_t<std::is_same_v<T, bfloat16>, TiledWorker, Worker<T>>;
#else
template <class T>
using WorkerOf = Worker<T>;
#endif

std::vector<Tile> tiles_of(const PagedAttention& p, const Shape& s) {
    std::vector<Tile> tiles;
    for (int64_t n = 0; n < p.sequences; ++n) {
        const int64_t begin = p.query_start_loc[n], end = p.query_start_loc[n + 1], keys = p.seq_lens[n];
        for (int64_t token = begin; token < end; token += s.tokens) {
            const int64_t last = std::min(token + s.tokens, end);
            for (int64_t head = 0; head < p.kv_heads; ++head)
                tiles.push_back({n, head, token, last - token, p.causal ? keys - (end - last) : keys});
        }
    }
    // The longest first, so that no thread begins with one at the end.
    std::stable_sort(tiles.begin(), tiles.end(),
                     [](const Tile& a, const Tile& b) { return a.tokens * a.keys > b.tokens * b.keys; });
    return tiles;
}

// Calls f(i, next) for each i < count on the threads of a team. A thread takes its next piece before it begins one, so that
// it can fetch some of it; `next` may be `count` or more.
template <class F>
void share(std::atomic<size_t>& taken, size_t count, F f) {
    for (size_t i = taken++, next; i < count; i = next) {
        next = taken++;
        f(i, next);
    }
}

template <class T>
void by_tiles(const PagedAttention& p, const Shape& s, const std::vector<Tile>& tiles, bool parallel) {
    std::atomic<size_t> taken{0};
#pragma omp parallel if (parallel)
    {
        WorkerOf<T> worker(p, s);
        share(taken, tiles.size(), [&](size_t i, size_t next) {
            worker.whole(tiles[i], next < tiles.size() ? Parts{&tiles[next], 0, 1} : Parts{});
        });
    }
}

template <class T>
void by_parts(const PagedAttention& p, const Shape& s, const std::vector<Tile>& tiles) {
    std::vector<Parts> parts;
    std::vector<int64_t> places, starts;  // of results
    int64_t floats = 0;
    for (const Tile& tile : tiles) {
        starts.push_back(floats);
        for (int64_t n = 0; n < tile.parts(); ++n, floats += WorkerOf<T>::floats(s, tile.tokens)) {
            parts.push_back({&tile, n, n + 1});
            places.push_back(floats);
        }
    }
    const auto results = scratch<float>(floats);
    std::atomic<size_t> taken{0};
#pragma omp parallel
    {
        WorkerOf<T> worker(p, s);
        share(taken, parts.size(), [&](size_t i, size_t next) {
            worker.part(parts[i], next < parts.size() ? parts[next] : Parts{}, results.get() + places[i]);
        });
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tiles.size(); ++i) worker.finish_parts(tiles[i], results.get() + starts[i]);
    }
}

template <class T>
void paged_attention(const PagedAttention& p) {
    const Shape s(p, WorkerOf<T>::kMostRows);
    const std::vector<Tile> tiles = tiles_of(p, s);
    int64_t work = 0, parts = 0, most_parts = 0;
    for (const Tile& tile : tiles) {
        work += tile.tokens * tile.keys * s.group * s.width;
        parts += tile.parts();
        most_parts = std::max(most_parts, tile.parts());
    }
    const int64_t threads = omp_get_max_threads(), count = int64_t(tiles.size());
    const bool parallel = threads > 1 && worth_threads(work);
    // Partitions go to different threads where there are few tiles and little memory is needed for it.
    if (parallel && most_parts > 1 && count < 4 * threads && parts * WorkerOf<T>::floats(s, s.tokens) < 1 << 25)
        by_parts<T>(p, s, tiles);
    else
        by_tiles<T>(p, s, tiles, parallel);
}

void store_row(const void* from, int64_t at, void* pool, int64_t to, int64_t bytes, int64_t count) {
    std::memcpy(static_cast<char*>(pool) + to * bytes, static_cast<const char*>(from) + at * bytes, count * bytes);
}

void store_kv(const StoreKv& p) {
#pragma omp parallel for schedule(static) if (worth_threads(p.tokens * p.kv_heads * p.head_dim * 4))
    for (int64_t t = 0; t < p.tokens; ++t) {
        if (p.slots[t] < 0) continue;
        const int64_t block = p.slots[t] / p.block_size, slot = p.slots[t] % p.block_size, bytes = p.element_bytes;
        for (int64_t h = 0; h < p.kv_heads; ++h) {
            store_row(p.k, t * p.k_token + h * p.k_head, p.keys,
                      block * p.key_block + slot * p.key_slot + h * p.key_head, bytes, p.head_dim);
            store_row(p.v, t * p.v_token + h * p.v_head, p.values,
                      block * p.value_block + slot * p.value_slot + h * p.value_head, bytes, p.head_dim);
        }
    }
}

}  // namespace
}  // namespace qnext

extern "C" bool qnext_paged_attention(const qnext::PagedAttention* p) {
    if (!p->in_range()) return false;
    qnext::with_type(p->dtype, [&](auto type) { qnext::paged_attention<decltype(type)>(*p); });
    return true;
}

extern "C" bool qnext_store_kv(const qnext::StoreKv* p) {
    if (!p->in_range()) return false;
    qnext::store_kv(*p);
    return true;
}
