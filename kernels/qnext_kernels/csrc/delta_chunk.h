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

// products[t] [kTileRows] = Σ_i tokens[i][t] tile[i] for kDotTokens tokens; rows of `tile` lie `stride` apart, of `tokens`
// 2 kBlockTokens, of `products` `to_next`. With Rounds, `rounded` is the tile in bfloat16: of two columns the elements of a
// row side by side.
template <bool Rounds>
__attribute__((noinline)) void dots(const float* tile, int64_t stride, int64_t width, const float* tokens, float* products,
                                    int64_t to_next, bfloat16* rounded = nullptr) {
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
            for (int v = 0; v < kTileVectors; ++v) rows[j][v] = Vec::load(tile + (i + j) * stride + v * Vec::size);
#pragma GCC unroll 8
            for (int t = 0; t < kDotTokens; ++t) {
                const Vec x = Vec::fill(tokens[(i + j) * 2 * kBlockTokens + t]);
#pragma GCC unroll 2
                for (int v = 0; v < kTileVectors; ++v) total[t][v] = fma(x, rows[j][v], total[t][v]);
            }
        }
        if constexpr (Rounds) {
#pragma GCC unroll 2
            for (int v = 0; v < kTileVectors; ++v) Pair{rows[0][v], rows[1][v]}.store(rounded + i * kTileRows + v * kPair);
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
        for (int v = 0; v < kTileVectors; ++v) rows[v] = (__m512bh)_mm512_loadu_si512(rounded + i * kTileRows + v * kPair);
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
            const Vec key = Vec::fill(tokens[i * 2 * kBlockTokens + s]);
#pragma GCC unroll 2
            for (int v = 0; v < kTileVectors; ++v) x[i][v] = fma(key, each[v], x[i][v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kUpdateColumns; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) x[i][v].store(tile + i * kTileRows + v * Vec::size);
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

}  // namespace delta

// Keys and queries of 16 tokens, prepared once for all value heads that read them.
class BlockKeys {
  public:
    explicit BlockKeys(int64_t width)
        : width(width), kq(scratch<float>(width * 2 * kBlockTokens)), pairs(scratch<uint32_t>(width / 2 * kBlockTokens)) {}

    // keys and queries [16, width]
    void prepare(const float* keys, const float* queries) {
        for (int side = 0; side < 2; ++side) {
            const float* from = side ? queries : keys;
            for (int64_t i = 0; i < width; i += Vec::size) {
                for (int t = 0; t < kBlockTokens; t += Vec::size) {
                    Vec square[Vec::size];
                    for (int r = 0; r < Vec::size; ++r) square[r] = Vec::load(from + (t + r) * width + i);
                    transpose(square);
                    for (int r = 0; r < Vec::size; ++r)
                        square[r].store(kq.get() + (i + r) * 2 * kBlockTokens + side * kBlockTokens + t);
                }
            }
        }
        for (int s = 0; s < kBlockTokens; s += delta::kDotTokens) {
            for (int t = 0; t < 2 * kBlockTokens; t += delta::kTileRows)
                delta::dots<false>(kq.get() + t, 2 * kBlockTokens, width, kq.get() + s, products[s] + t, 2 * kBlockTokens);
        }
    }

    // The queries as they came, `to_next` apart, and what `prepare` had multiplied them by: then their products with the state
    // are those of bfloat16.
    void prepare_queries(const bfloat16* queries, int64_t to_next, const float* scales) {
#if defined(__AVX512F__)
        rounds = width % kPair == 0;
        if (!rounds) return;
        std::copy_n(scales, kBlockTokens, query_scales);
        for (int64_t i = 0; i < width; i += kPair) {
            Vec square[Vec::size];
            for (int t = 0; t < kBlockTokens; ++t) square[t].v = _mm512_loadu_ps(queries + t * to_next + i);
            transpose(square);
            for (int j = 0; j < Vec::size; ++j) _mm512_storeu_ps(pairs.get() + (i / 2 + j) * kBlockTokens, square[j].v);
        }
#endif
    }

    const int64_t width;
    const Scratch<float> kq;  // [width, keys of 16 tokens and then queries]
    alignas(64) float products[kBlockTokens][2 * kBlockTokens];  // [s]: k_t·k_s, then q_t·k_s
    bool rounds = false;
    const Scratch<uint32_t> pairs;  // if so: the queries as they came [width / 2, 16], two elements side by side
    alignas(64) float query_scales[kBlockTokens];
};

// One value head's 16 tokens, prepared once for all rows.
class DeltaBlock {
  public:
    explicit DeltaBlock(const BlockKeys& keys)
        : shared(keys), width(keys.width), rounded(scratch<bfloat16>(width * delta::kTileRows)) {}

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
            (shared.rounds ? decay * Vec::load(shared.query_scales + t) : decay).store(query_decays + t);
        }
    }

    int64_t steps() const { return 2 * kBlockTokens / delta::kDotTokens + width / delta::kUpdateColumns; }

    // `count` rows of the state, at most kTileRows, in their tile. v and o: of these rows and the first token; those of the
    // next lie v_token and o_token elements further. between(): called steps() times on the way.
    template <class T, class F>
    void advance(float* tile, int64_t count, const T* v, int64_t v_token, T* o, int64_t o_token, F between) {
        using namespace delta;
        alignas(64) float products[2 * kBlockTokens * kTileRows];
        const float* const kq = shared.kq.get();
        for (int t = 0; t < 2 * kBlockTokens; t += kDotTokens) {
            between();
            dots_of(tile, t, products + t * kTileRows);
        }
        for (int64_t first = 0; first < count; first += Vec::size) {
            if (first + Vec::size <= count)
                solve(products + first, weighted + first, v + first, v_token, o + first, o_token, Whole());
            else
                solve(products + first, weighted + first, v + first, v_token, o + first, o_token, Part{count - first});
        }
        for (int64_t i = 0; i < width; i += kUpdateColumns) {
            between();
            update(tile + i * kTileRows, decays[kBlockTokens - 1], weighted, kq + i * 2 * kBlockTokens);
        }
    }

  private:
    // The products of a tile with keys or queries t to t + kDotTokens.
    void dots_of(const float* tile, int t, float* products) {
        using namespace delta;
        const float* const tokens = shared.kq.get() + t;
#if defined(__AVX512F__)
        if (shared.rounds && t >= kBlockTokens)
            return dots(rounded.get(), width, shared.pairs.get() + t - kBlockTokens, products);
        if (shared.rounds && t == 0) return dots<true>(tile, kTileRows, width, tokens, products, kTileRows, rounded.get());
#endif
        dots<false>(tile, kTileRows, width, tokens, products, kTileRows);
    }

    // For a vector of rows d, weighted for the update, and o from the products with the state before the block.
    template <class T, class P>
    void solve(const float* products, float* weighted, const T* v, int64_t v_token, T* o, int64_t o_token, P part) {
        using delta::kTileRows;
        alignas(64) float plain[kBlockTokens * Vec::size];
        Vec d[kBlockTokens], total[kBlockTokens];
#pragma GCC unroll 16
        for (int t = 0; t < kBlockTokens; ++t) {
            const Vec product = Vec::load(products + t * kTileRows);
            d[t] = fma(Vec::fill(minus_beta_decays[t]), product, Vec::fill(betas[t]) * load(v + t * v_token, part));
        }
#pragma GCC unroll 16
        for (int s = 0; s < kBlockTokens; ++s)
#pragma GCC unroll 16
            for (int t = s + 1; t < kBlockTokens; ++t) d[t] = fma(Vec::fill(minus_with_key[s][t]), d[s], d[t]);
        for (int t = 0; t < kBlockTokens; ++t) {
            d[t].store(plain + t * Vec::size);
            (d[t] * Vec::fill(to_end[t])).store(weighted + t * kTileRows);
        }
#pragma GCC unroll 16
        for (int t = 0; t < kBlockTokens; ++t)
            total[t] = Vec::fill(query_decays[t]) * Vec::load(products + (kBlockTokens + t) * kTileRows);
#pragma GCC unroll 16
        for (int s = 0; s < kBlockTokens; ++s) {
            const Vec each = Vec::load(plain + s * Vec::size);
#pragma GCC unroll 16
            for (int t = s; t < kBlockTokens; ++t) total[t] = fma(Vec::fill(with_query[s][t]), each, total[t]);
        }
        for (int t = 0; t < kBlockTokens; ++t) store(total[t], o + t * o_token, part);
    }

    const BlockKeys& shared;
    const int64_t width;
    const Scratch<bfloat16> rounded;  // the tile that is worked on
    // [s][t]: −β_t e^(G_t − G_s) k_t·k_s, and e^(G_t − G_s) q_t·k_s
    alignas(64) float minus_with_key[kBlockTokens][kBlockTokens], with_query[kBlockTokens][kBlockTokens];
    alignas(64) float decays[kBlockTokens], betas[kBlockTokens], minus_beta_decays[kBlockTokens], to_end[kBlockTokens];
    alignas(64) float query_decays[kBlockTokens];
    alignas(64) float weighted[kBlockTokens * delta::kTileRows] = {};
};

}  // namespace qnext
