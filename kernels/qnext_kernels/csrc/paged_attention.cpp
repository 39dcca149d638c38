// Attention over a paged cache of keys and values: decode, verify and prefill run the same steps, so they have the same
// bits.
//
// A query's softmax runs through blocks of 48 keys within partitions of 576, both counted from the start of its
// sequence, and partitions are put together in order; keys behind a query's own are left out, not masked. So the bits of
// a query's result do not depend on the other queries, and one long sequence still occupies many threads.
//
// Scores of bfloat16 come from dot products of pairs where the processor has them; weights and values are float32.
//
// With 8 query heads a key-value head, float32 has 4 vector operations a vector of the cache and query head: at bfloat16
// a decode is bound by them as much as by the memory. So that the times do not add up, the keys and values of the next
// block are fetched in step with the operations. The cache is read as it lies: two bfloat16 in 32 bits are two floats after
// a shift and a mask, so that queries and results are kept in the order even elements, odd elements.
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "attention_tile.h"
#include "decoder_layer.h"

namespace qnext {

namespace {

constexpr int64_t kBlock = 48;
constexpr int64_t kPartition = 576;
// Queries, of all heads of a group, that meet a block together: the more, the more often what is fetched is used.
constexpr int64_t kTileRows = 64, kMostTileRows = 256;
constexpr int kSoftened = 4;             // vectors of scores at once

// A vector of lanes; where they fill half of it, twice.
inline Vec load_lanes(const float* p, int64_t times) {
    if (times == 1) return Vec::load(p);
#if defined(__AVX512F__)
    return {_mm512_broadcast_f32x8(_mm256_loadu_ps(p))};
#else
    return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))};
#endif
}

inline void store_lanes(Vec x, float* p, int64_t times) {
    if (times == 1) return x.store(p);
#if defined(__AVX512F__)
    _mm256_storeu_ps(p, _mm512_castps512_ps256(x.v));
#else
    _mm_storeu_ps(p, _mm256_castps256_ps128(x.v));
#endif
}

// The halves of a vector in the other order.
inline Vec swapped(Vec x) {
#if defined(__AVX512F__)
    return {_mm512_shuffle_f32x4(x.v, x.v, 0x4e)};
#else
    return {_mm256_permute2f128_ps(x.v, x.v, 1)};
#endif
}

struct Shape {
    explicit Shape(const PagedAttention& p)
        : group(p.heads / p.kv_heads), lanes(2 * group <= Vec::size ? Vec::size / 2 : padded(group)),
          width((p.head_dim + kPair - 1) / kPair * kPair),
          tokens(tokens_of(p, group)) {}
    // Eight tiles a thread are enough.
    static int64_t tokens_of(const PagedAttention& p, int64_t group) {
        const int64_t share = p.query_start_loc[p.sequences] * p.kv_heads / (8 * omp_get_max_threads());
        return std::max<int64_t>(1, std::clamp(share, kTileRows / group, kMostTileRows / group));
    }
    int64_t group, lanes, width, tokens;  // query heads a key-value head; both sizes in whole vectors; tokens a tile
};

// Neighbouring query tokens of one sequence, and the query heads of one key-value head.
struct Tile {
    int64_t sequence, kv_head, token, tokens, keys;  // keys: of the last token
    int64_t parts() const { return (keys + kPartition - 1) / kPartition; }
};

// A partition of the keys of a tile; of none where there is no such.
struct Part {
    const Tile* tile;
    int64_t number;
    int64_t begin() const { return number * kPartition; }
    int64_t count() const { return tile ? std::min(kPartition, tile->keys - begin()) : 0; }
};

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
    float *values, *end;     // [tokens, group, width]
};

// One thread's.
template <class T>
class Worker {
  public:
    Worker(const PagedAttention& p, const Shape& s)
        : p(p), s(s), queries(scratch<Element>(s.tokens * s.group * s.width)),
          weights(scratch<float>(s.tokens * kBlock * s.lanes)), factors(scratch<float>(s.tokens * s.lanes)),
          copy(scratch<T>(2 * kBlock * s.width)),
          part_memory(scratch<float>(Softmax::floats(s, s.tokens))), memory(scratch<float>(Softmax::floats(s, s.tokens))) {
        std::fill_n(weights.get(), s.tokens * kBlock * s.lanes, 0.0f);
        ahead.bytes = p.head_dim * int64_t(sizeof(T));
    }

    // `next`: what this thread computes then, of which some is fetched; none or nothing where that is not known.
    void whole(const Tile& tile, const Tile* next) {
        begin(tile);
        const Softmax part(part_memory.get(), s, t.tokens), all(memory.get(), s, t.tokens);
        for (int64_t i = 0; i < t.parts(); ++i) {
            const Softmax& to = i ? part : all;
            attend({&tile, i}, i + 1 < t.parts() ? Part{&tile, i + 1} : Part{next, 0}, to);
            if (i) join(i, part, all);
        }
        finish(all);
    }

    void part(const Part& part, const Part& next, float* result) {
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

    // Keys that token i of the tile sees.
    int64_t keys_of(int64_t i) const { return p.causal ? t.keys - (t.tokens - 1 - i) : t.keys; }

    const T* row(const void* data, int64_t token, int64_t token_stride, int64_t head_stride, int64_t g) const {
        return static_cast<const T*>(data) + token * token_stride + (t.kv_head * s.group + g) * head_stride;
    }

    void begin(const Tile& tile) {
        t = tile;
        Element* to = queries.get();
        for (int64_t i = 0; i < t.tokens; ++i) {
            for (int64_t g = 0; g < s.group; ++g, to += s.width) {
                const T* from = row(p.q, t.token + i, p.q_token, p.q_head, g);
                if constexpr (std::is_same_v<T, Element>)
                    std::fill(std::copy_n(from, p.head_dim, to), to + s.width, T{});
                else
                    for (int64_t c = 0; c < s.width; c += kPair) load_pair(from, c, p.head_dim).store(to + c);
            }
        }
    }

    void attend(const Part& part, const Part& next, const Softmax& to) {
        const int64_t total = part.count(), after = std::min(kBlock, next.count());
        to.clear();
        find(part, total, 0);
        find(next, after, total);
        rows[2 * (total + after)] = copy.get();
        ahead.last = rows + 2 * (total + after);
        ahead.rows = rows;
        for (int64_t done = 0; done < total; done += kBlock) {
            const int64_t count = std::min(kBlock, total - done), start = part.begin() + done;
            const T* const* from = rows + 2 * done;
            const T* const* const later = rows + 2 * std::min(done + kBlock, total);
            if (ahead.rows < later || done + kBlock < total) ahead.begin(later);
            if (s.width != p.head_dim) from = pad(from, count);
            for (int64_t i = 0; i < t.tokens; ++i) seen[i] = std::clamp<int64_t>(keys_of(i) - start, 0, count);
            score(from);
            for (int64_t i = 0; i < t.tokens; ++i) {
                if (seen[i]) soften(i, to);
            }
            weigh(from, to);
        }
    }

    // Keys and values with zeros behind their ends.
    const T* const* pad(const T* const* from, int64_t count) {
        T* to = copy.get();
        for (int64_t j = 0; j < 2 * count; ++j, to += s.width) {
            std::fill(std::copy_n(from[j], p.head_dim, to), to + s.width, T{});
            padded_rows[j] = to;
        }
        return padded_rows;
    }

    // Where the first `count` keys and values of a partition lie.
    void find(const Part& part, int64_t count, int64_t at) {
        if (!count) return;
        const Tile& tile = *part.tile;
        int64_t column = tile.sequence * p.table_row + part.begin() / p.block_size, slot = part.begin() % p.block_size;
        for (const int64_t end = at + count; at < end; ++column, slot = 0) {
            const int64_t block = p.block_table[column];
            const T* k = static_cast<const T*>(p.keys) + block * p.key_block + tile.kv_head * p.key_head + slot * p.key_slot;
            const T* v = static_cast<const T*>(p.values) + block * p.value_block + tile.kv_head * p.value_head +
                         slot * p.value_slot;
            const int64_t stop = std::min(end, at + p.block_size - slot);
            for (; at < stop; ++at, k += p.key_slot, v += p.value_slot) {
                rows[2 * at] = k;
                rows[2 * at + 1] = v;
            }
        }
    }

    float* weights_of(int64_t i) const { return weights.get() + i * kBlock * s.lanes; }

    void score(const T* const* from) {
        const Vec scale = Vec::fill(float(p.scale * 1.4426950408889634));
        for (int64_t i = 0; i < t.tokens; ++i) {
            for (int64_t j = 0; j < seen[i]; j += kKeys) {
                for (int64_t g = 0; g < s.group; g += kRows) {
                    const Element* q = queries.get() + (i * s.group + g) * s.width;
                    float* out = weights_of(i) + j * s.lanes + g;
                    with_rows<kRows>(s.group - g, [&](auto together) {
                        dots<together.value>(q, s.width, from + 2 * j, seen[i] - j, scale, out, s.lanes,
                                         i ? nullptr : &ahead);
                    });
                }
            }
        }
    }

    // Scores of token i, as exponents of 2, become weights, a query a lane; what was weighted by a smaller largest score gets
    // a factor.
    void soften(int64_t i, const Softmax& to) {
        const int64_t together = std::max<int64_t>(1, Vec::size / s.lanes), step = together * s.lanes;
        float* const scores = weights_of(i);
        // Behind the last key are weights of 0, up to whole steps of kSoftened vectors.
        const int64_t vectors = (seen[i] + kSoftened * together - 1) / (kSoftened * together) * kSoftened;
        std::fill(scores + seen[i] * s.lanes, scores + vectors * step, -std::numeric_limits<float>::infinity());
        for (int64_t g = 0; g < s.lanes; g += Vec::size) {
            float *w = scores + g, *largest = to.largest + i * s.lanes + g, *total = to.total + i * s.lanes + g;
            const Vec before = load_lanes(largest, together);
            Vec tops[kSoftened], sums[kSoftened];
            for (int k = 0; k < kSoftened; ++k) {
                tops[k] = before;
                sums[k] = Vec::zero();
            }
            for (int64_t j = 0; j < vectors; j += kSoftened) {
#pragma GCC unroll 4
                for (int k = 0; k < kSoftened; ++k) tops[k] = max(tops[k], Vec::load(w + (j + k) * step));
            }
            Vec top = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
            if (together == 2) top = max(top, swapped(top));
            for (int64_t j = 0; j < vectors; j += kSoftened) {
                Vec e[kSoftened];
#pragma GCC unroll 4
                for (int k = 0; k < kSoftened; ++k) e[k] = Vec::load(w + (j + k) * step) - top;
                exp2(e);
#pragma GCC unroll 4
                for (int k = 0; k < kSoftened; ++k) {
                    e[k].store(w + (j + k) * step);
                    sums[k] = sums[k] + e[k];
                }
            }
            Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            if (together == 2) sum = sum + swapped(sum);
            const Vec factor = exp2(before - top);
            sum = fma(load_lanes(total, together), factor, sum);
            store_lanes(top, largest, together);
            store_lanes(sum, total, together);
            store_lanes(factor, factors.get() + i * s.lanes + g, together);
        }
    }

    void weigh(const T* const* from, const Softmax& sums) {
        for (int64_t c = 0; c < s.width; c += kPair) {
            for (int64_t i = 0; i < t.tokens; ++i) {
                if (!seen[i]) continue;
                for (int64_t g = 0; g < s.group; g += kRows) {
                    float* out = sums.values + (i * s.group + g) * s.width;
                    const float* factor = factors.get() + i * s.lanes + g;
                    with_rows<kRows>(s.group - g, [&](auto results) {
                        add_weighted<results.value>(weights_of(i) + g, s.lanes, factor, from, seen[i], c, out, s.width,
                                                 i ? nullptr : &ahead);
                    });
                }
            }
        }
    }

    // Puts a partition's result behind that of the partitions before it.
    void join(int64_t part, const Softmax& from, const Softmax& to) const {
        for (int64_t i = 0; i < t.tokens; ++i) {
            if (keys_of(i) <= part * kPartition) continue;
            for (int64_t r = 0; r < s.group; ++r) {
                const int64_t at = i * s.lanes + r, row = (i * s.group + r) * s.width;
                join_row(from.largest[at], from.total[at], from.values + row, to.largest[at], to.total[at], to.values + row);
            }
        }
    }

    void join_row(float largest, float total, const float* values, float& to_largest, float& to_total,
                  float* to_values) const {
        const float top = std::max(to_largest, largest);
        const Vec old = exp2(Vec::fill(to_largest - top)), added = exp2(Vec::fill(largest - top));
        const Vec sum = fma(added, Vec::fill(total), old * Vec::fill(to_total));
        to_largest = top;
        float lanes[Vec::size];
        sum.store(lanes);
        to_total = lanes[0];
        for (int64_t c = 0; c < s.width; c += Vec::size)
            fma(added, Vec::load(values + c), old * Vec::load(to_values + c)).store(to_values + c);
    }

    void finish(const Softmax& all) const {
        for (int64_t i = 0; i < t.tokens; ++i) {
            for (int64_t g = 0; g < s.group; ++g) {
                const int64_t token = t.token + i;
                T* to = static_cast<T*>(p.out) + (token * p.heads + t.kv_head * s.group + g) * p.head_dim;
                const T* gate = p.gate ? row(p.gate, token, p.gate_token, p.gate_head, g) : nullptr;
                const Vec inverse = Vec::fill(1.0f / all.total[i * s.lanes + g]);
                const float* values = all.values + (i * s.group + g) * s.width;
                for (int64_t c = 0; c < s.width; c += kPair) {
                    Pair x = load_pair(values + c);
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
    Scratch<float> weights, factors;
    Scratch<T> copy;
    Scratch<float> part_memory, memory;
    // Of a partition and of the next block: key, value, key, value …, and behind them memory that no one waits for.
    const T* rows[2 * (kPartition + kBlock) + 1];
    const T* padded_rows[2 * kBlock];
    Ahead<T> ahead;
    int64_t seen[kMostTileRows];  // keys of the current block, by token
};

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
        Worker<T> worker(p, s);
        share(taken, tiles.size(), [&](size_t i, size_t next) {
            worker.whole(tiles[i], next < tiles.size() ? &tiles[next] : nullptr);
        });
    }
}

template <class T>
void by_parts(const PagedAttention& p, const Shape& s, const std::vector<Tile>& tiles) {
    std::vector<Part> parts;
    std::vector<int64_t> places, starts;  // of results
    int64_t floats = 0;
    for (const Tile& tile : tiles) {
        starts.push_back(floats);
        for (int64_t n = 0; n < tile.parts(); ++n, floats += Softmax::floats(s, tile.tokens)) {
            parts.push_back({&tile, n});
            places.push_back(floats);
        }
    }
    const auto results = scratch<float>(floats);
    std::atomic<size_t> taken{0};
#pragma omp parallel
    {
        Worker<T> worker(p, s);
        share(taken, parts.size(), [&](size_t i, size_t next) {
            worker.part(parts[i], next < parts.size() ? parts[next] : Part{}, results.get() + places[i]);
        });
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tiles.size(); ++i) worker.finish_parts(tiles[i], results.get() + starts[i]);
    }
}

template <class T>
void paged_attention(const PagedAttention& p) {
    const Shape s(p);
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
    if (parallel && most_parts > 1 && count < 4 * threads && parts * Softmax::floats(s, s.tokens) < 1 << 25)
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
