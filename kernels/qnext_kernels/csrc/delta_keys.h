// What the value heads of a key head share: the keys and queries of a tile of tokens; and how what comes later is fetched.
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

// Divides [width] floats by their length (ε 1e-6) and multiplies them by `scale`.
inline void normalise(float* x, int64_t width, float scale) {
    Vec squares = Vec::zero();
    for (int64_t i = 0; i < width; i += Vec::size) squares = fma(Vec::load(x + i), Vec::load(x + i), squares);
    const float factor = scale / std::sqrt(sum(squares) + 1e-6f);
    for (int64_t i = 0; i < width; i += Vec::size) (Vec::load(x + i) * Vec::fill(factor)).store(x + i);
}

// What the value heads of a key head share: keys and queries of a tile of tokens. T: of the tokens.
template <class T>
class KeyTile {
  public:
    static constexpr int64_t kFloats = 2 * kTile + BlockKeys::kFloats;  // that it needs times `width`, aligned to a vector

    KeyTile(const DeltaRule& p, int64_t head, float* floats)
        : p(p), head(head), width(padded(p.key_dim)), keys(floats), queries(floats + kTile * width),
          block(width, floats + 2 * kTile * width) {}

    // A tile of tokens [start, stop), to be run one by one.
    void prepare_tokens(int64_t start, int64_t stop) {
        load(start, stop);
        for (int64_t t = 0; t < stop - start; ++t) {
            const float *k = keys + t * width, *q = queries + t * width;
            Vec product = Vec::zero();
            for (int64_t i = 0; i < width; i += Vec::size) product = fma(Vec::load(k + i), Vec::load(q + i), product);
            kq[t] = sum(product);
        }
    }

    // A whole tile, which begins at `start`, to be run at once.
    void prepare_block(int64_t start) {
#if defined(__AVX512F__)
        if constexpr (std::is_same_v<T, bfloat16>) {
            if (width == p.key_dim && width % kPair == 0)
                return block.prepare(key(start), p.k_token, query(start), p.q_token);
        }
#endif
        load(start, start + kTile);
        block.prepare(keys, queries);
    }

    const T* key(int64_t t) const { return static_cast<const T*>(p.k) + t * p.k_token + head * p.k_head; }
    const T* query(int64_t t) const { return static_cast<const T*>(p.q) + t * p.q_token + head * p.q_head; }

    const DeltaRule& p;
    const int64_t head, width;
    float *const keys, *const queries;  // [kTile, width]
    BlockKeys block;
    float kq[kTile];

  private:
    void load(int64_t start, int64_t stop) {
        // All are read before any is worked on: so many reads of memory overlap.
        for (int64_t t = start; t < stop; ++t) {
            load_row(key(t), p.key_dim, keys + (t - start) * width, width);
            load_row(query(t), p.key_dim, queries + (t - start) * width, width);
        }
        for (int64_t t = 0; t < stop - start; ++t) {
            normalise(keys + t * width, width, 1.0f);
            normalise(queries + t * width, width, 1.0f / std::sqrt(float(p.key_dim)));
        }
    }
};

// Rows that are read or written later, fetched line by line in so many steps: a processor does not foresee rows that lie
// apart, has few reads of memory under way at once, and waits with whatever comes behind them.
template <class T>
class LinesAhead {
  public:
    // `count` rows of `size` elements, `to_next` apart.
    LinesAhead(const T* row, int64_t to_next, int64_t count, int64_t size, int64_t steps)
        : row(row), to_next(to_next), size(size), lines((size + kLine - 1) / kLine * count), steps(steps) {}

    // (In line: a compiler leaves out calls of functions that do nothing but fetch.)
    QNEXT_INLINE void step() {
        for (due += lines; due >= steps; due -= steps) {
            _mm_prefetch(reinterpret_cast<const char*>(row + at), _MM_HINT_T0);
            if ((at += kLine) >= size) at = 0, row += to_next;
        }
    }

  private:
    static constexpr int64_t kLine = 64 / sizeof(T);
    const T* row;
    int64_t to_next, size, lines, steps, at = 0, due = 0;
};

}  // namespace qnext
