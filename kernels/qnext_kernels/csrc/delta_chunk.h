// The gated delta rule for a block of 16 tokens at once, on some rows of one value head's state.
//
// With S the state before the block, G_t the sum of the log decays up to token t, γ_t = e^(G_t), for each row:
//   d_t = β_t (v_t − γ_t S·k_t − Σ_{s<t} e^(G_t − G_s) (k_t·k_s) d_s)        forward substitution
//   o_t = γ_t S·q_t + Σ_{s<=t} e^(G_t − G_s) (q_t·k_s) d_s
//   S' = γ_15 S + Σ_s e^(G_15 − G_s) d_s k_sᵀ
// in float32, except that S·q_t, which only o_t has a part of, are BF16 dot products where queries are bfloat16 and the
// processor has them: of S rounded once, which errs by no more than rounding o does. An element of the state takes 51
// multiply-adds a block where the recurrence takes 64 operations, and is read twice and written once where the recurrence
// reads it 32 times.
//
// A vector has the same column of neighbouring rows, which never meet: so what a block computes within itself needs no sums
// across a vector, and the state lies in tiles of a few rows, column by column.
#pragma once

#include <algorithm>

#include "pairs.h"
#include "rows.h"

namespace qnext {

constexpr int kBlockTokens = 16;

namespace delta {

constexpr int kTileVectors = 2;
constexpr int kTileRows = kTileVectors * Vec::size;
// Tokens whose products with a tile fill the registers, and columns of a tile that do.
constexpr int kDotTokens = Vec::size == 16 ? 8 : 4;
constexpr int kUpdateColumns = Vec::size == 16 ? 8 : 4;

// products[t] [kTileRows] = Σ_i tokens[i][t] tile[i] for kDotTokens tokens of [width, kBlockTokens]; rows of `tile` lie
// `stride` apart, the vectors of one `to_vector`, and rows of `products` `to_next`. With Rounds, `rounded`
// [kTileVectors, width / 2, kPair] is the tile in bfloat16: of two columns the elements of a row side by side.
template <bool Rounds>
__attribute__((noinline)) void dots(const float* tile, int64_t stride, int64_t to_vector, int64_t width, const float* tokens,
                                    float* products, int64_t to_next, bfloat16* rounded = nullptr) {
    Vec total[kDotTokens][kTileVectors];
#pragma GCC unroll 8
    for (int t = 0; t < kDotTokens; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) total[t][v] = Vec::zero();
    for (int64_t i = 0; i < width; i += 2) {
        Vec rows[2][kTileVectors];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
#pragma GCC unroll 2
            for (int v = 0; v < kTileVectors; ++v) rows[j][v] = Vec::load(tile + (i + j) * stride + v * to_vector);
#pragma GCC unroll 8
            for (int t = 0; t < kDotTokens; ++t) {
                const Vec x = Vec::fill_from(tokens + (i + j) * kBlockTokens + t);
#pragma GCC unroll 2
                for (int v = 0; v < kTileVectors; ++v) total[t][v] = fma(x, rows[j][v], total[t][v]);
            }
        }
        if constexpr (Rounds) {
#pragma GCC unroll 2
            for (int v = 0; v < kTileVectors; ++v) Pair{rows[0][v], rows[1][v]}.store(rounded + (v * width + i) * Vec::size);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kDotTokens; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) total[t][v].store(products + t * to_next + v * Vec::size);
}

#if defined(__AVX512F__)

// The same of such a tile in bfloat16, and of tokens [width / 2, kBlockTokens] with two elements side by side.
__attribute__((noinline)) inline void dots(const bfloat16* rounded, int64_t width, const uint32_t* tokens, float* products) {
    __m512 total[kDotTokens][kTileVectors];
#pragma GCC unroll 8
    for (int t = 0; t < kDotTokens; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) total[t][v] = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 2) {
        __m512bh rows[kTileVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) rows[v] = (__m512bh)_mm512_loadu_si512(rounded + (v * width + i) * Vec::size);
#pragma GCC unroll 8
        for (int t = 0; t < kDotTokens; ++t) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(int(tokens[i / 2 * kBlockTokens + t]));
#pragma GCC unroll 2
            for (int v = 0; v < kTileVectors; ++v) total[t][v] = _mm512_dpbf16_ps(total[t][v], x, rows[v]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kDotTokens; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) _mm512_storeu_ps(products + t * kTileRows + v * Vec::size, total[t][v]);
}

#endif

// tile[i] = decay tile[i] + Σ_s tokens[i][s] d[s] for kUpdateColumns columns; d [16, kTileRows].
__attribute__((noinline)) inline void update(float* tile, float decay, const float* d, const float* tokens) {
    Vec x[kUpdateColumns][kTileVectors];
    const Vec decays = Vec::fill(decay);
#pragma GCC unroll 8
    for (int i = 0; i < kUpdateColumns; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) x[i][v] = Vec::load(tile + i * kTileRows + v * Vec::size) * decays;
    for (int s = 0; s < kBlockTokens; ++s) {
        Vec each[kTileVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) each[v] = Vec::load(d + s * kTileRows + v * Vec::size);
#pragma GCC unroll 8
        for (int i = 0; i < kUpdateColumns; ++i) {
            const Vec key = Vec::fill_from(tokens + i * kBlockTokens + s);
#pragma GCC unroll 2
            for (int v = 0; v < kTileVectors; ++v) x[i][v] = fma(key, each[v], x[i][v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kUpdateColumns; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) x[i][v].store(tile + i * kTileRows + v * Vec::size);
}

// `size` elements will be read or written. (In line: a compiler leaves out calls of functions that do nothing but fetch.)
template <class T>
QNEXT_INLINE inline void fetch_lines(const T* from, int64_t size) {
    for (int64_t i = 0; i < size; i += 64 / sizeof(T)) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
}

// `count` rows [count, width], at most kTileRows, become a tile [width, kTileRows]; rows behind the last are zero.
inline void to_tile(const float* rows, int64_t count, int64_t width, float* tile) {
    for (int64_t i = 0; i < width; i += Vec::size) {
        for (int64_t first = 0; first < kTileRows; first += Vec::size) {
            Vec square[Vec::size];
            for (int64_t r = 0; r < Vec::size; ++r)
                square[r] = first + r < count ? Vec::load(rows + (first + r) * width + i) : Vec::zero();
            transpose(square);
            for (int64_t r = 0; r < Vec::size; ++r) square[r].store(tile + (i + r) * kTileRows + first);
        }
    }
}

// The reverse.
inline void from_tile(const float* tile, int64_t count, int64_t width, float* rows) {
    for (int64_t i = 0; i < width; i += Vec::size) {
        for (int64_t first = 0; first < count; first += Vec::size) {
            Vec square[Vec::size];
            for (int64_t r = 0; r < Vec::size; ++r) square[r] = Vec::load(tile + (i + r) * kTileRows + first);
            transpose(square);
            for (int64_t r = 0; r < std::min<int64_t>(Vec::size, count - first); ++r)
                square[r].store(rows + (first + r) * width + i);
        }
    }
}

// One row of `tokens` [tokens, kTileRows] for a tile's rows.
template <class T>
QNEXT_INLINE inline void load_rows(const T* from, Vec (&to)[kTileVectors], Whole) {
#pragma GCC unroll 2
    for (int i = 0; i < kTileVectors; ++i) to[i] = Vec::load(from + i * Vec::size);
}

template <class T>
QNEXT_INLINE inline void load_rows(const T* from, Vec (&to)[kTileVectors], Part part) {
    T padded[kTileRows] = {};
    std::memcpy(padded, from, size_t(part.count) * sizeof(T));
    load_rows(padded, to, Whole());
}

template <class T>
QNEXT_INLINE inline void store_rows(const Vec (&from)[kTileVectors], T* to, Whole) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, bfloat16>)
        return _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(from[1].v, from[0].v));
#endif
#pragma GCC unroll 2
    for (int i = 0; i < kTileVectors; ++i) from[i].store(to + i * Vec::size);
}

template <class T>
QNEXT_INLINE inline void store_rows(const Vec (&from)[kTileVectors], T* to, Part part) {
    T padded[kTileRows];
    store_rows(from, padded, Whole());
    std::memcpy(to, padded, size_t(part.count) * sizeof(T));
}

// to[t] += factors[t] row for t from `from` on.
QNEXT_INLINE inline void add(Vec (&to)[kDotTokens][kTileVectors], int from, const float* factors, const float* row) {
    Vec each[kTileVectors];
#pragma GCC unroll 2
    for (int i = 0; i < kTileVectors; ++i) each[i] = Vec::load(row + i * Vec::size);
#pragma GCC unroll 8
    for (int t = from; t < kDotTokens; ++t) {
        const Vec factor = Vec::fill(factors[t]);
#pragma GCC unroll 2
        for (int i = 0; i < kTileVectors; ++i) to[t][i] = fma(factor, each[i], to[t][i]);
    }
}

}  // namespace delta

// Keys and queries of 16 tokens, prepared once for all value heads that read them.
class BlockKeys {
  public:
    static constexpr int64_t kFloats = 3 * kBlockTokens;  // that it needs times `width`, aligned to a vector

    BlockKeys(int64_t width, float* floats)
        : width(width), kq(floats), pairs(reinterpret_cast<uint32_t*>(floats + 2 * width * kBlockTokens)) {}

    // keys and queries [16, width], normalised
    void prepare(const float* keys, const float* queries) {
        for (int side = 0; side < 2; ++side) {
            const float* from = side ? queries : keys;
            for (int64_t i = 0; i < width; i += Vec::size) {
                for (int t = 0; t < kBlockTokens; t += Vec::size) {
                    Vec square[Vec::size];
                    for (int r = 0; r < Vec::size; ++r) square[r] = Vec::load(from + (t + r) * width + i);
                    transpose(square);
                    for (int r = 0; r < Vec::size; ++r)
                        square[r].store(kq + (side * width + i + r) * kBlockTokens + t);
                }
            }
        }
        const auto vector = [&](int t) { return kq + t / kBlockTokens * width * kBlockTokens + t % kBlockTokens; };
        for (int s = 0; s < kBlockTokens; s += delta::kDotTokens) {
            for (int t = 0; t < 2 * kBlockTokens; t += delta::kTileRows)
                delta::dots<false>(vector(t), kBlockTokens, vector(t + Vec::size) - vector(t), width, kq + s,
                                   products[s] + t, 2 * kBlockTokens);
        }
    }

#if defined(__AVX512F__)

    // Keys and queries as they came, k_token and q_token apart, of whole kPairs. As dot products, those of each other are exact
    // but for the sums.
    void prepare(const bfloat16* keys, int64_t k_token, const bfloat16* queries, int64_t q_token) {
        rounds = true;
        const Vec key_scales = normalise(keys, k_token, pairs, 1.0f);
        const Vec query_scales = normalise(queries, q_token, query_pairs(), 1.0f / std::sqrt(float(width)));
        key_scales.store(scales[0]);
        query_scales.store(scales[1]);
        const __m512i odd = _mm512_set1_epi32(int(0xffff0000));
        for (int64_t i = 0; i < width; i += 2) {
            const __m512i two = _mm512_loadu_si512(pairs + i / 2 * kBlockTokens);
            (Vec{_mm512_castsi512_ps(_mm512_slli_epi32(two, 16))} * key_scales).store(kq + i * kBlockTokens);
            (Vec{_mm512_castsi512_ps(_mm512_and_si512(two, odd))} * key_scales).store(kq + (i + 1) * kBlockTokens);
        }
        const bfloat16* const both = reinterpret_cast<const bfloat16*>(pairs);
        for (int s = 0; s < kBlockTokens; s += delta::kDotTokens) delta::dots(both, width, pairs + s, products[s]);
        for (int s = 0; s < kBlockTokens; ++s) {
            const Vec scale = Vec::fill(scales[0][s]);
            (Vec::load(products[s]) * key_scales * scale).store(products[s]);
            (Vec::load(products[s] + kBlockTokens) * query_scales * scale).store(products[s] + kBlockTokens);
        }
    }

#endif

    uint32_t* query_pairs() const { return pairs + width / 2 * kBlockTokens; }

    const int64_t width;
    float* const kq;  // keys [width, 16], then queries unless `rounds`
    alignas(64) float products[kBlockTokens][2 * kBlockTokens];  // [s]: k_t·k_s, then q_t·k_s
    bool rounds = false;
    uint32_t* const pairs;  // if so: keys [width / 2, 16] as they came, two elements side by side, and then queries
    alignas(64) float scales[2][kBlockTokens];  // and what each token's are multiplied by

  private:
#if defined(__AVX512F__)
    // Moves tokens, `to_next` apart, to `to` [width / 2, 16]; returns what divides each by its length (ε 1e-6), times `scale`.
    Vec normalise(const bfloat16* from, int64_t to_next, uint32_t* to, float scale) const {
        __m512 squares[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = 0; i < width; i += kPair) {
            Vec square[Vec::size];
            for (int t = 0; t < kBlockTokens; ++t) square[t].v = _mm512_loadu_ps(from + t * to_next + i);
            transpose(square);
            for (int j = 0; j < Vec::size; ++j) {
                _mm512_storeu_ps(to + (i / 2 + j) * kBlockTokens, square[j].v);
                squares[j % 4] = _mm512_dpbf16_ps(squares[j % 4], (__m512bh)square[j].v, (__m512bh)square[j].v);
            }
        }
        const Vec sum = (Vec{squares[0]} + Vec{squares[1]}) + (Vec{squares[2]} + Vec{squares[3]});
        return Vec::fill(scale) / Vec{_mm512_sqrt_ps((sum + Vec::fill(1e-6f)).v)};
    }
#endif
};

// One value head's 16 tokens, prepared once for all its rows.
class DeltaBlock {
  public:
    static constexpr int64_t kFloats = delta::kTileRows / 2;  // that it needs times `width`, aligned to a vector

    DeltaBlock(const BlockKeys& keys, float* floats)
        : shared(keys), width(keys.width), rounded(reinterpret_cast<bfloat16*>(floats)) {}

    // log_decay and beta [16], of the tokens whose keys and queries are prepared
    void prepare(const float* log_decay, const float* beta) {
        float sums[kBlockTokens], total = 0.0f;
        for (int t = 0; t < kBlockTokens; ++t) sums[t] = total += log_decay[t];
        for (int s = 0; s < kBlockTokens; ++s) {
            for (int t = 0; t < kBlockTokens; t += Vec::size) {
                // Behind s only: before it the factor could overflow, and nothing reads it.
                const Vec factor = exp(min(Vec::load(sums + t) - Vec::fill(sums[s]), Vec::zero()));
                const float* row = shared.products[s] + t;
                (Vec::zero() - Vec::load(row) * factor * Vec::load(beta + t)).store(minus_with_key[s] + t);
                (Vec::load(row + kBlockTokens) * factor).store(with_query[s] + t);
            }
        }
        for (int t = 0; t < kBlockTokens; t += Vec::size) {
            const Vec decay = exp(Vec::load(sums + t)), b = Vec::load(beta + t);
            decay.store(decays + t);
            (Vec::zero() - b * decay).store(minus_beta_decays + t);
            b.store(betas + t);
            exp(Vec::fill(total) - Vec::load(sums + t)).store(to_end + t);
            (shared.rounds ? decay * Vec::load(shared.scales[1] + t) : decay).store(query_decays + t);
        }
    }

    int64_t steps() const { return 2 * kBlockTokens / delta::kDotTokens + width / delta::kUpdateColumns; }

    // `count` rows of the state, at most kTileRows, in their tile. v and o: of these rows and the first token; those of the
    // next lie v_token and o_token elements further. is_zero: the tile is. between(): called steps() times on the way.
    template <class T, class F>
    void advance(float* tile, bool is_zero, int64_t count, const T* v, int64_t v_token, T* o, int64_t o_token, F between) {
        using namespace delta;
        alignas(64) float products[2 * kBlockTokens * kTileRows];
        const float* const kq = shared.kq;
        for (int t = 0; t < 2 * kBlockTokens; t += kDotTokens) {
            between();
            // A write would wait for its line, and all behind it.
            for (int written = t / 2; written < (t + kDotTokens) / 2; ++written) fetch_lines(o + written * o_token, count);
            if (!is_zero) dots_of(tile, t, products + t * kTileRows);
        }
        if (is_zero) std::fill_n(products, 2 * kBlockTokens * kTileRows, 0.0f);
        if (count == kTileRows)
            solve(products, v, v_token, o, o_token, Whole());
        else
            solve(products, v, v_token, o, o_token, Part{count});
        for (int64_t i = 0; i < width; i += kUpdateColumns) {
            between();
            update(tile + i * kTileRows, decays[kBlockTokens - 1], weighted, kq + i * kBlockTokens);
        }
    }

  private:
    // The products of a tile with keys, or then queries, t to t + kDotTokens.
    void dots_of(const float* tile, int t, float* products) {
        using namespace delta;
        const int side = t / kBlockTokens, token = t % kBlockTokens;
        const float* const tokens = shared.kq + side * width * kBlockTokens + token;
#if defined(__AVX512F__)
        if (shared.rounds && side) return dots(rounded, width, shared.query_pairs() + token, products);
        if (shared.rounds && t == 0)
            return dots<true>(tile, kTileRows, Vec::size, width, tokens, products, kTileRows, rounded);
#endif
        dots<false>(tile, kTileRows, Vec::size, width, tokens, products, kTileRows);
    }

    // d of a tile, weighted for the update, and o from the products with the state before the block: a few tokens at a time,
    // each with what those before it add and then with what they add to each other.
    template <class T, class P>
    void solve(const float* products, const T* v, int64_t v_token, T* o, int64_t o_token, P part) {
        using namespace delta;
        alignas(64) float d[kBlockTokens * kTileRows];
        for (int first = 0; first < kBlockTokens; first += kDotTokens) {
            solve_few(first, products, v + first * v_token, v_token, d, part);
            outputs_of_few(first, products + kBlockTokens * kTileRows, d, o + first * o_token, o_token, part);
        }
    }

    template <class T, class P>
    QNEXT_INLINE void solve_few(int first, const float* products, const T* v, int64_t v_token, float* d, P part) {
        using namespace delta;
        Vec x[kDotTokens][kTileVectors];
#pragma GCC unroll 8
        for (int t = 0; t < kDotTokens; ++t) {
            load_rows(v + t * v_token, x[t], part);
#pragma GCC unroll 2
            for (int i = 0; i < kTileVectors; ++i) {
                const Vec product = Vec::load(products + (first + t) * kTileRows + i * Vec::size);
                x[t][i] = fma(Vec::fill(minus_beta_decays[first + t]), product, Vec::fill(betas[first + t]) * x[t][i]);
            }
        }
        for (int s = 0; s < first; ++s) add(x, 0, minus_with_key[s] + first, d + s * kTileRows);
#pragma GCC unroll 8
        for (int s = 0; s < kDotTokens; ++s) {
#pragma GCC unroll 8
            for (int t = s + 1; t < kDotTokens; ++t) {
                const Vec factor = Vec::fill(minus_with_key[first + s][first + t]);
#pragma GCC unroll 2
                for (int i = 0; i < kTileVectors; ++i) x[t][i] = fma(factor, x[s][i], x[t][i]);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < kDotTokens; ++t) {
#pragma GCC unroll 2
            for (int i = 0; i < kTileVectors; ++i) {
                const int at = (first + t) * kTileRows + i * Vec::size;
                x[t][i].store(d + at);
                (x[t][i] * Vec::fill(to_end[first + t])).store(weighted + at);
            }
        }
    }

    template <class T, class P>
    QNEXT_INLINE void outputs_of_few(int first, const float* products, const float* d, T* o, int64_t o_token, P part) const {
        using namespace delta;
        Vec x[kDotTokens][kTileVectors];
#pragma GCC unroll 8
        for (int t = 0; t < kDotTokens; ++t) {
#pragma GCC unroll 2
            for (int i = 0; i < kTileVectors; ++i) {
                const Vec product = Vec::load(products + (first + t) * kTileRows + i * Vec::size);
                x[t][i] = Vec::fill(query_decays[first + t]) * product;
            }
        }
        for (int s = 0; s < first; ++s) add(x, 0, with_query[s] + first, d + s * kTileRows);
#pragma GCC unroll 8
        for (int s = 0; s < kDotTokens; ++s) add(x, s, with_query[first + s] + first, d + (first + s) * kTileRows);
#pragma GCC unroll 8
        for (int t = 0; t < kDotTokens; ++t) store_rows(x[t], o + t * o_token, part);
    }

    const BlockKeys& shared;
    const int64_t width;
    bfloat16* const rounded;  // the tile that is worked on
    // [s][t]: −β_t e^(G_t − G_s) k_t·k_s, and e^(G_t − G_s) q_t·k_s
    alignas(64) float minus_with_key[kBlockTokens][kBlockTokens], with_query[kBlockTokens][kBlockTokens];
    alignas(64) float decays[kBlockTokens], betas[kBlockTokens], minus_beta_decays[kBlockTokens], to_end[kBlockTokens];
    alignas(64) float query_decays[kBlockTokens];
    alignas(64) float weighted[kBlockTokens * delta::kTileRows];
};

}  // namespace qnext
