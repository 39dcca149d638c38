// The gated delta rule for a block of 16 tokens at once, on some rows of one value head's state.
//
// With S the state before the block, G_t the sum of the log decays up to token t, γ_t = e^(G_t), for each row:
//   d_t = β_t (v_t − γ_t S·k_t − Σ_{s<t} e^(G_t − G_s) (k_t·k_s) d_s)        forward substitution
//   o_t = γ_t S·q_t + Σ_{s<=t} e^(G_t − G_s) (q_t·k_s) d_s
//   S' = γ_15 S + Σ_s e^(G_15 − G_s) d_s k_sᵀ
// all in float32. An element of the state takes 51 multiply-adds a block where the recurrence takes 64 operations, and is
// read twice and written once where the recurrence reads it 32 times.
#pragma once

#include <algorithm>

#include "rows.h"

namespace qnext {

constexpr int kBlockTokens = 16;

namespace delta {

constexpr int kTokenVectors = kBlockTokens / Vec::size;  // of a row of 16 tokens
constexpr int kDotRows = Vec::size == 16 ? 8 : 2;        // rows whose products with 32 tokens fill the registers
// Rows and vectors of each that are updated together.
constexpr int kUpdateRows = Vec::size == 16 ? 4 : 2;
constexpr int kUpdateVectors = 4;

// products[r] = the products of R rows with the 16 keys, then with the 16 queries; kq [width, 32].
template <int R>
__attribute__((noinline)) void dots(const float* const* rows, int64_t width, const float* kq, float* products) {
    constexpr int vectors = 2 * kTokenVectors;
    Vec total[R][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) total[r][v] = Vec::zero();
    const float* from[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) from[r] = rows[r];
    for (int64_t i = 0; i < width; ++i) {
        Vec tokens[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) tokens[v] = Vec::load(kq + i * 2 * kBlockTokens + v * Vec::size);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec x = Vec::fill(from[r][i]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) total[r][v] = fma(x, tokens[v], total[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) total[r][v].store(products + r * 2 * kBlockTokens + v * Vec::size);
}

// rows[r] [V vectors] = decay rows[r] + Σ_s d[s][r] keys[s], for R rows.
template <int R, int V>
__attribute__((noinline)) void update(float* rows, int64_t width, float decay, const float* d, const float* keys) {
    Vec x[R][V];
    const Vec decays = Vec::fill(decay);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) x[r][v] = Vec::load(rows + r * width + v * Vec::size) * decays;
    for (int s = 0; s < kBlockTokens; ++s) {
        Vec weight[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) weight[r] = Vec::fill(d[s * Vec::size + r]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const Vec key = Vec::load(keys + s * width + v * Vec::size);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) x[r][v] = fma(weight[r], key, x[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) x[r][v].store(rows + r * width + v * Vec::size);
}

// tokens[t] = the products of Vec::size rows with token t; by_row: theirs with 32 tokens, of which the first 16 are taken.
inline void by_token(const float* by_row, Vec (&tokens)[kBlockTokens]) {
#pragma GCC unroll 2
    for (int t = 0; t < kBlockTokens; t += Vec::size) {
        Vec square[Vec::size];
        for (int r = 0; r < Vec::size; ++r) square[r] = Vec::load(by_row + r * 2 * kBlockTokens + t);
        transpose(square);
        for (int r = 0; r < Vec::size; ++r) tokens[t + r] = square[r];
    }
}

}  // namespace delta

// Keys and queries of 16 tokens, prepared once for all value heads that read them.
class BlockKeys {
  public:
    explicit BlockKeys(int64_t width) : width(width), kq(scratch<float>(width * 2 * kBlockTokens)) {}

    // keys and queries [16, width]
    void prepare(const float* keys, const float* queries) {
        this->keys = keys;
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
        for (int s = 0; s < kBlockTokens; s += delta::kDotRows) {
            const float* rows[delta::kDotRows];
            for (int r = 0; r < delta::kDotRows; ++r) rows[r] = keys + (s + r) * width;
            delta::dots<delta::kDotRows>(rows, width, kq.get(), products[s]);
        }
    }

    const int64_t width;
    const float* keys = nullptr;
    const Scratch<float> kq;  // [width, keys of 16 tokens and then queries]
    alignas(64) float products[kBlockTokens][2 * kBlockTokens];  // [s]: k_t·k_s, then q_t·k_s
};

// One value head's 16 tokens, prepared once for all rows.
class DeltaBlock {
  public:
    explicit DeltaBlock(const BlockKeys& keys) : shared(keys), width(keys.width) {}

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
        }
    }

    // `count` rows, at most Vec::size, of the state [count, width] in place. v and o: of these rows and the first token;
    // those of the next lie v_token and o_token elements further.
    template <class T>
    void advance(float* rows, int64_t count, const T* v, int64_t v_token, T* o, int64_t o_token) {
        alignas(64) float by_row[Vec::size * 2 * kBlockTokens];
        const float* from[Vec::size];
        for (int r = 0; r < Vec::size; ++r) from[r] = rows + std::min<int64_t>(r, count - 1) * width;
        for (int r = 0; r < Vec::size; r += delta::kDotRows)
            delta::dots<delta::kDotRows>(from + r, width, shared.kq.get(), by_row + r * 2 * kBlockTokens);
        if (count == Vec::size)
            solve(by_row, v, v_token, o, o_token, Whole());
        else
            solve(by_row, v, v_token, o, o_token, Part{count});
        int64_t r = 0;
        for (; r + delta::kUpdateRows <= count; r += delta::kUpdateRows) update<delta::kUpdateRows>(rows + r * width, r);
        for (; r < count; ++r) update<1>(rows + r * width, r);
    }

  private:
    // d, weighted for the update, and o from the products with the state before the block.
    template <class T, class P>
    void solve(const float* by_row, const T* v, int64_t v_token, T* o, int64_t o_token, P part) {
        alignas(64) float plain[kBlockTokens * Vec::size];
        Vec d[kBlockTokens], total[kBlockTokens];
        delta::by_token(by_row, d);
#pragma GCC unroll 16
        for (int t = 0; t < kBlockTokens; ++t)
            d[t] = fma(Vec::fill(minus_beta_decays[t]), d[t], Vec::fill(betas[t]) * load(v + t * v_token, part));
#pragma GCC unroll 16
        for (int s = 0; s < kBlockTokens; ++s)
#pragma GCC unroll 16
            for (int t = s + 1; t < kBlockTokens; ++t) d[t] = fma(Vec::fill(minus_with_key[s][t]), d[s], d[t]);
        for (int t = 0; t < kBlockTokens; ++t) {
            d[t].store(plain + t * Vec::size);
            (d[t] * Vec::fill(to_end[t])).store(weighted + t * Vec::size);
        }
        delta::by_token(by_row + kBlockTokens, total);
#pragma GCC unroll 16
        for (int t = 0; t < kBlockTokens; ++t) total[t] = Vec::fill(decays[t]) * total[t];
#pragma GCC unroll 16
        for (int s = 0; s < kBlockTokens; ++s) {
            const Vec each = Vec::load(plain + s * Vec::size);
#pragma GCC unroll 16
            for (int t = s; t < kBlockTokens; ++t) total[t] = fma(Vec::fill(with_query[s][t]), each, total[t]);
        }
        for (int t = 0; t < kBlockTokens; ++t) store(total[t], o + t * o_token, part);
    }

    template <int R>
    void update(float* rows, int64_t first) const {
        using namespace delta;
        int64_t i = 0;
        const float decay = decays[kBlockTokens - 1];
        const float* keys = shared.keys;
        for (; i + kUpdateVectors * Vec::size <= width; i += kUpdateVectors * Vec::size)
            delta::update<R, kUpdateVectors>(rows + i, width, decay, weighted + first, keys + i);
        for (; i < width; i += Vec::size) delta::update<R, 1>(rows + i, width, decay, weighted + first, keys + i);
    }

    const BlockKeys& shared;
    const int64_t width;
    // [s][t]: −β_t e^(G_t − G_s) k_t·k_s, and e^(G_t − G_s) q_t·k_s
    alignas(64) float minus_with_key[kBlockTokens][kBlockTokens], with_query[kBlockTokens][kBlockTokens];
    alignas(64) float decays[kBlockTokens], betas[kBlockTokens], minus_beta_decays[kBlockTokens], to_end[kBlockTokens];
    alignas(64) float weighted[kBlockTokens * Vec::size];
};

}  // namespace qnext
