// What the value heads of a key head share: the keys and queries of a tile of tokens, and when those of the next are fetched.
#pragma once

#include <algorithm>

#include "delta_chunk.h"
#include "delta_net.h"

namespace qnext {

constexpr int kTile = kBlockTokens; // tokens whose keys and queries lie in the cache together; divides kChunk

template <class T>
void load_row(const T* from, int64_t size, float* to, int64_t width) {
    int64_t i = 0;
    for (; i + Vec::size <= size; i += Vec::size) Vec::load(from + i).store(to + i);
    for (; i < size; ++i) to[i] = to_float(from[i]);
    for (; i < width; ++i) to[i] = 0.0f;
}

template <class T>
void store_row(const float* from, int64_t size, T* to) {
    int64_t i = 0;
    for (; i + Vec::size <= size; i += Vec::size) Vec::load(from + i).store(to + i);
    for (; i < size; ++i) assign(to[i], from[i]);
}

// Divides [width] floats by their length (ε 1e-6) and multiplies them by `scale`; returns by what they are multiplied in all.
inline float normalise(float* x, int64_t width, float scale) {
    Vec squares = Vec::zero();
    for (int64_t i = 0; i < width; i += Vec::size) squares = fma(Vec::load(x + i), Vec::load(x + i), squares);
    const float factor = scale / std::sqrt(sum(squares) + 1e-6f);
    for (int64_t i = 0; i < width; i += Vec::size) (Vec::load(x + i) * Vec::fill(factor)).store(x + i);
    return factor;
}

// What the value heads of a key head share: keys and queries of a tile of tokens. T: of the tokens.
template <class T>
class KeyTile {
  public:
    KeyTile(const DeltaRule& p, int64_t head)
        : p(p), head(head), width(padded(p.key_dim)), keys(scratch<float>(kTile * width)),
          queries(scratch<float>(kTile * width)) {}

    void prepare(int64_t start, int64_t stop) {
        // All are read before any is worked on: so many reads of memory overlap.
        for (int64_t t = start; t < stop; ++t) {
            load_row(key(t), p.key_dim, keys.get() + (t - start) * width, width);
            load_row(query(t), p.key_dim, queries.get() + (t - start) * width, width);
        }
        for (int64_t t = 0; t < stop - start; ++t) {
            normalise(keys.get() + t * width, width, 1.0f);
            query_scales[t] = normalise(queries.get() + t * width, width, 1.0f / std::sqrt(float(p.key_dim)));
        }
    }

    // What so many tokens need besides, to be run one by one.
    void prepare_tokens(int64_t count) {
        for (int64_t t = 0; t < count; ++t) {
            const float *k = keys.get() + t * width, *q = queries.get() + t * width;
            Vec product = Vec::zero();
            for (int64_t i = 0; i < width; i += Vec::size) product = fma(Vec::load(k + i), Vec::load(q + i), product);
            kq[t] = sum(product);
        }
    }

    // What a whole tile, which begins at `start`, needs besides, to be run at once.
    const BlockKeys& prepare_block(int64_t start) {
        if (!block) block = std::make_unique<BlockKeys>(width);
        block->prepare(keys.get(), queries.get());
        if constexpr (std::is_same_v<T, bfloat16>) {
            if (width == p.key_dim) block->prepare_queries(query(start), p.q_token, query_scales);
        }
        return *block;
    }

    // Token t will be read: such rows lie too far apart for a processor to foresee it. (In line: a compiler leaves out calls of
    // functions that do nothing but fetch.)
    QNEXT_INLINE void fetch(int64_t t) const {
        fetch_lines(key(t), p.key_dim);
        fetch_lines(query(t), p.key_dim);
    }

    QNEXT_INLINE static void fetch_lines(const T* from, int64_t size) {
        for (int64_t i = 0; i < size; i += 64 / sizeof(T))
            _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
    }

    const DeltaRule& p;
    const int64_t head, width;
    const Scratch<float> keys, queries;  // [kTile, width]
    float kq[kTile], query_scales[kTile];

  private:
    const T* key(int64_t t) const { return static_cast<const T*>(p.k) + t * p.k_token + head * p.k_head; }
    const T* query(int64_t t) const { return static_cast<const T*>(p.q) + t * p.q_token + head * p.q_head; }

    std::unique_ptr<BlockKeys> block;
};

// Tokens from `token` on, `count` of them, a few in each of `steps` steps: a processor has few reads of memory under way at
// once, and waits with whatever comes behind them.
struct Spread {
    int64_t token, count, steps, due = 0;
    template <class F>
    QNEXT_INLINE void step(F f) {
        for (due += count; due >= steps; due -= steps) f(token++);
    }
};

}  // namespace qnext
