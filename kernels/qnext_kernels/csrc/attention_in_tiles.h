// Attention of bfloat16 over a paged cache with AMX.
//
// Keys times queries give scores with the queries side by side, so that a vector softens one key's for 16 queries and no sum
// runs across it. Weights are turned around for the products with values, each as the sum of two bfloat16, so that nothing is
// rounded to bfloat16 but the result. A query's softmax is that of a partition of its keys at once; partitions are put
// together in order. Keys behind a query's own get a weight of 0, and those behind the last that a tile sees are not read. So
// the bits of a query's result do not depend on the other queries.
#pragma once

#include <algorithm>
#include <limits>

#include "attention_work.h"
#include "kv_pages.h"
#include "tiles.h"

#if defined(QNEXT_TILES)

namespace qnext {

// One thread's. A row is a query token with a query head; `rows` of a tile are in whole tiles of AMX.
class TiledWorker {
    static constexpr int64_t kKeys = tiles::kRows, kPairBytes = kPair * 2;
    static constexpr int64_t kTileWeights = 2 * kPartition * kKeys;  // of 16 rows, in two parts
    static_assert(kPair == tiles::kColumns && kPartition % tiles::kColumns == 0);

  public:
    // Of a tile's result: of each row the largest score, the sum of the weights, and the values weighted so.
    static int64_t floats(const Shape& s, int64_t tokens) { return rows_of(s, tokens) * (2 + s.width); }

    TiledWorker(const PagedAttention& p, const Shape& s)
        : p(p), s(s), queries(scratch<bfloat16>(rows_of(s, s.tokens) * s.width)),
          scores(scratch<float>(2 * kPartition * kKeys)), weights(scratch<bfloat16>(2 * kTileWeights)),
          values(scratch<bfloat16>(kPartition * s.width)), memory(scratch<float>(floats(s, s.tokens))),
          some(scratch<float>(2 * kKeys * s.width)) {}

    // What comes next is nothing that this asks for early: a processor foresees the rows well enough.
    void whole(const Tile& tile, const Parts& next) {
        const tiles::FlushSubnormals flush;
        part({&tile, 0, tile.parts()}, next, memory.get());
        finish(result(memory.get()));
    }

    void part(const Parts& parts, const Parts&, float* to) {
        begin(*parts.tile);
        const Result all = result(to);
        const tiles::FlushSubnormals flush;
        tiles::configure({kKeys, kKeys, kKeys, kKeys, kKeys, kKeys, kKeys, kKeys});
        for (int64_t part = parts.first; part < parts.last; ++part) attend(part, all, part == parts.first);
        tiles::release();
    }

    void finish_parts(const Tile& tile, float* parts) {
        t = tile;
        const tiles::FlushSubnormals flush;
        const Result all = result(parts);
        for (int64_t i = 1; i < t.parts(); ++i) {
            const Result each = result(parts + i * floats(s, t.tokens));
            join(i, 0, rows(), each.largest, each.total, each.values, all);
        }
        finish(all);
    }

  private:
    struct Result {
        float *largest, *total;  // [rows]
        float* values;           // [rows, width], columns in the order of `twos`
    };

    // Where 16 rows of keys lie, a stride in elements apart.
    struct KeyRows {
        const bfloat16* data;
        int64_t stride;
    };

    static int64_t rows_of(const Shape& s, int64_t tokens) { return (tokens * s.group + kKeys - 1) / kKeys * kKeys; }
    int64_t rows() const { return rows_of(s, t.tokens); }

    Result result(float* memory) const { return {memory, memory + rows(), memory + 2 * rows()}; }

    // Keys that a row of the tile sees; none behind the last row.
    int64_t keys_of(int64_t row) const {
        const int64_t i = row / s.group;
        return i >= t.tokens ? 0 : p.causal ? t.keys - (t.tokens - 1 - i) : t.keys;
    }

    const bfloat16* row(const void* data, int64_t row, int64_t token_stride, int64_t head_stride) const {
        const int64_t token = t.token + row / s.group, head = t.kv_head * s.group + row % s.group;
        return static_cast<const bfloat16*>(data) + token * token_stride + head * head_stride;
    }

    // kPair columns of a row of the cache or of queries, zeros behind the last.
    __m512i columns(const bfloat16* row, int64_t c) const {
        const int64_t left = p.head_dim - c;
        return left >= kPair ? _mm512_loadu_si512(row + c) : _mm512_maskz_loadu_epi16((uint32_t(1) << left) - 1, row + c);
    }

    // Queries as the second operand: of 16 rows [width / 32, pairs of columns, 16, 2].
    void begin(const Tile& tile) {
        t = tile;
        bfloat16* to = queries.get();
        for (int64_t first = 0; first < rows(); first += kKeys) {
            for (int64_t c = 0; c < s.width; c += kPair, to += tiles::kSize) {
                Vec square[kKeys];
                for (int64_t r = 0; r < kKeys; ++r)
                    square[r].v = first + r < t.tokens * s.group
                                      ? _mm512_castsi512_ps(columns(row(p.q, first + r, p.q_token, p.q_head), c))
                                      : _mm512_setzero_ps();
                transpose(square);
                for (int64_t r = 0; r < kKeys; ++r) square[r].store(reinterpret_cast<float*>(to) + r * Vec::size);
            }
        }
    }

    void find(Kind kind, int64_t part, int64_t count, const bfloat16** to) const {
        Run<bfloat16>(p, kind, t.sequence, t.kv_head, part * kPartition, count).next(count, to, nullptr);
    }

    // A partition to `all`, or joined to it.
    void attend(int64_t part, const Result& all, bool is_first) {
        const int64_t count = std::min(kPartition, t.keys - part * kPartition);
        find(Kind::keys, part, count, key_rows);
        find(Kind::values, part, count, value_rows);
        for (int64_t key = 0; key < count; key += kKeys) keys[key / kKeys] = key_tile(key, count);
        const int64_t pairs = 2 * kKeys;
        bool interleaved = false;
        for (int64_t first = 0; first < rows(); first += pairs) {
            const int64_t last_row = std::min(first + pairs, t.tokens * s.group) - 1;
            const int64_t visible = std::min(keys_of(last_row) - part * kPartition, count);
            if (visible <= 0) continue;
            const bool two = last_row >= first + kKeys;
            score(first, visible, two);
            if (!interleaved) interleave(count);
            interleaved = true;
            float *largest = all.largest + first, *total = all.total + first, *sums = all.values + first * s.width;
            alignas(64) float part_largest[2 * kKeys], part_total[2 * kKeys];
            if (!is_first) largest = part_largest, total = part_total, sums = some.get();
            for (int64_t tile = 0; tile < 1 + two; ++tile)
                soften(first + tile * kKeys, part, visible, scores.get() + tile * kPartition * kKeys,
                       weights.get() + tile * kTileWeights, largest + tile * kKeys, total + tile * kKeys);
            if (finite || keys_of(first) - part * kPartition >= visible) {
                weigh(visible, two, sums);
            } else {
                weigh_each(first, part, visible, two, sums);
                interleaved = false;
            }
            if (!is_first) join(part, first, two ? pairs : kKeys, largest, total, sums, all);
        }
    }

    // 16 keys, in place where they lie evenly and are whole, else copied, zeros behind their ends and the last.
    KeyRows key_tile(int64_t key, int64_t count) {
        const bfloat16* const* from = key_rows + key;
        if (s.width == p.head_dim && key + kKeys <= count) {
            const int64_t stride = from[1] - from[0];
            bool even = true;
            for (int64_t i = 2; i < kKeys; ++i) even &= from[i] - from[i - 1] == stride;
            if (even) return {from[0], stride};
        }
        if (!copies) copies = scratch<bfloat16>(kPartition * s.width);
        bfloat16* const to = copies.get() + key * s.width;
        for (int64_t i = 0; i < kKeys; ++i)
            for (int64_t c = 0; c < s.width; c += kPair)
                _mm512_store_si512(to + i * s.width + c, key + i < count ? columns(from[i], c) : _mm512_setzero_si512());
        return {to, s.width};
    }

    // Pairs of values side by side, as the second operand: [count / 2, width, 2], columns in the order of `twos`. Notes whether
    // all are finite.
    void interleave(int64_t count) {
        const int64_t padded = (count + tiles::kColumns - 1) / tiles::kColumns * tiles::kColumns;
        const __m512i exponent = _mm512_set1_epi16(0x7f80);
        __mmask32 special = 0;
        bfloat16* to = values.get();
        for (int64_t key = 0; key < padded; key += 2, to += 2 * s.width) {
            for (int64_t c = 0; c < s.width; c += kPair) {
                const auto row = [&](int64_t i) { return i < count ? columns(value_rows[i], c) : _mm512_setzero_si512(); };
                const __m512i first = row(key), second = row(key + 1);
                for (const __m512i each : {first, second})
                    special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(each, exponent), exponent);
                _mm512_store_si512(to + 2 * c, _mm512_unpacklo_epi16(first, second));
                _mm512_store_si512(to + 2 * c + kPair, _mm512_unpackhi_epi16(first, second));
            }
        }
        finite = !special;
    }

    // Scores [keys, 16] of one or two tiles of rows, behind the last key of whatever is there.
    void score(int64_t first, int64_t visible, bool two) {
        const bfloat16* const q = queries.get() + first * s.width;
        const int64_t key_tiles = (visible + kKeys - 1) / kKeys;
        const auto at = [&](int64_t n) { return keys[std::min(n, key_tiles - 1)]; };
        for (int64_t n = 0; n < key_tiles; n += two ? 2 : 4) {
            float* const to = scores.get() + n * kKeys * Vec::size;
            if (two)
                score_two(q, at(n), at(n + 1), to);
            else
                score_one(q, at(n), at(n + 1), at(n + 2), at(n + 3), to);
        }
    }

    // Two tiles of keys with two of rows.
    void score_two(const bfloat16* q, KeyRows a, KeyRows b, float* to) const {
        tiles::zero_sums();
        for (int64_t c = 0; c < s.width; c += kPair, q += tiles::kSize) {
            tiles::load<4>(a.data + c, 2 * a.stride);
            tiles::load<6>(q, kPairBytes);
            tiles::multiply<0, 4, 6>();
            tiles::load<5>(b.data + c, 2 * b.stride);
            tiles::multiply<2, 5, 6>();
            tiles::load<7>(q + kKeys * s.width, kPairBytes);
            tiles::multiply<1, 4, 7>();
            tiles::multiply<3, 5, 7>();
        }
        tiles::store<0>(to, 64);
        tiles::store<2>(to + kKeys * kKeys, 64);
        tiles::store<1>(to + kPartition * kKeys, 64);
        tiles::store<3>(to + (kPartition + kKeys) * kKeys, 64);
    }

    // Four with one: sums of fewer tiles would wait for each other.
    void score_one(const bfloat16* q, KeyRows a, KeyRows b, KeyRows c, KeyRows d, float* to) const {
        tiles::zero_sums();
        for (int64_t column = 0; column < s.width; column += kPair, q += tiles::kSize) {
            tiles::load<7>(q, kPairBytes);
            tiles::load<4>(a.data + column, 2 * a.stride);
            tiles::multiply<0, 4, 7>();
            tiles::load<5>(b.data + column, 2 * b.stride);
            tiles::multiply<1, 5, 7>();
            tiles::load<6>(c.data + column, 2 * c.stride);
            tiles::multiply<2, 6, 7>();
            tiles::load<4>(d.data + column, 2 * d.stride);
            tiles::multiply<3, 4, 7>();
        }
        tiles::store<0>(to, 64);
        tiles::store<1>(to + kKeys * kKeys, 64);
        tiles::store<2>(to + 2 * kKeys * kKeys, 64);
        tiles::store<3>(to + 3 * kKeys * kKeys, 64);
    }

    // Of 16 rows: the largest score, weights as the first operand [keys / 32, parts, 16, 32], and their sum.
    void soften(int64_t first, int64_t part, int64_t visible, const float* scores, bfloat16* weights, float* largest,
                float* total) {
        const Vec scale = Vec::fill(float(p.scale * 1.4426950408889634));
        const Vec never = Vec::fill(-std::numeric_limits<float>::infinity());
        alignas(64) int32_t seen[kKeys];
        int64_t all_see = visible;
        for (int64_t r = 0; r < kKeys; ++r) {
            const int64_t count = std::clamp<int64_t>(keys_of(first + r) - part * kPartition, 0, visible);
            seen[r] = int32_t(count);
            all_see = std::min(all_see, count);
        }
        const __m512i limits = _mm512_load_si512(seen);
        const auto score = [&](int64_t key) QNEXT_INLINE {
            const Vec x = Vec::load(scores + key * kKeys) * scale;
            if (key < all_see) return x;
            return Vec{_mm512_mask_mov_ps(never.v, _mm512_cmpgt_epi32_mask(limits, _mm512_set1_epi32(int(key))), x.v)};
        };
        Vec tops[4] = {never, never, never, never};
        int64_t key = 0;
        for (; key + 4 <= visible; key += 4)
            for (int i = 0; i < 4; ++i) tops[i] = max(tops[i], score(key + i));
        for (; key < visible; ++key) tops[0] = max(tops[0], score(key));
        const Vec top = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
        top.store(largest);
        // Rows that see no key have weights of 0.
        const Vec shift{_mm512_mask_mov_ps(top.v, _mm512_cmp_ps_mask(top.v, never.v, _CMP_EQ_OQ), Vec::zero().v)};
        Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
        for (int64_t block = 0; block < visible; block += tiles::kColumns, weights += 2 * tiles::kSize) {
            Vec high[kKeys], low[kKeys];
            for (int r = 0; r < int(kKeys); r += 2) {
                Vec e[4];
                for (int i = 0; i < 4; ++i) {
                    const int64_t at = block + 2 * r + i;
                    e[i] = at < visible ? score(at) - shift : never;
                }
                exp2(e);
                for (int i = 0; i < 4; ++i) sums[i] = sums[i] + e[i];
                for (int i = 0; i < 2; ++i) split(e[2 * i], e[2 * i + 1], high[r + i], low[r + i]);
            }
            transpose(high);
            transpose(low);
            for (int r = 0; r < int(kKeys); ++r) {
                high[r].store(reinterpret_cast<float*>(weights) + r * Vec::size);
                low[r].store(reinterpret_cast<float*>(weights + tiles::kSize) + r * Vec::size);
            }
        }
        ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(total);
    }

    // Two keys' weights side by side, as bfloat16 and what is missing from those.
    QNEXT_INLINE static void split(Vec first, Vec second, Vec& high, Vec& low) {
        const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
        const auto pairs = [](Vec x, Vec y) QNEXT_INLINE {
            alignas(64) bfloat16 elements[kPair];
            Pair{x, y}.store(elements);
            return _mm512_load_si512(elements);
        };
        const __m512i rounded = pairs(first, second);
        high.v = _mm512_castsi512_ps(rounded);
        low.v = _mm512_castsi512_ps(pairs(first - Vec{_mm512_castsi512_ps(_mm512_slli_epi32(rounded, 16))},
                                          second - Vec{_mm512_castsi512_ps(_mm512_and_si512(rounded, upper))}));
    }

    // to [16 a tile, width] = the values of keys times their weights, in one or two tiles of rows.
    void weigh(int64_t visible, bool two, float* to) const {
        const int64_t steps = (visible + tiles::kColumns - 1) / tiles::kColumns;
        for (int64_t c = 0; c < s.width;) {
            const bfloat16* const from = values.get() + 2 * c;
            if (two) {
                weigh_two(steps, from, to + c);
                c += kPair;
            } else if (c + kPair < s.width) {
                weigh_one<2>(steps, from, to + c);
                c += 2 * kPair;
            } else {
                weigh_one<1>(steps, from, to + c);
                c += kPair;
            }
        }
    }

    // Two tiles of rows with kPair columns.
    void weigh_two(int64_t steps, const bfloat16* v, float* to) const {
        const int64_t row = 4 * s.width;  // bytes
        tiles::zero_sums();
        const bfloat16* w = weights.get();
        for (int64_t n = 0; n < steps; ++n, v += tiles::kColumns * s.width) {
            tiles::load<6>(v, row);
            tiles::load<7>(v + kPair, row);
            for (int part = 0; part < 2; ++part, w += tiles::kSize) {
                tiles::load<4>(w, kPairBytes);
                tiles::multiply<0, 4, 6>();
                tiles::multiply<1, 4, 7>();
                tiles::load<5>(w + kTileWeights, kPairBytes);
                tiles::multiply<2, 5, 6>();
                tiles::multiply<3, 5, 7>();
            }
        }
        tiles::store<0>(to, row);
        tiles::store<1>(to + Vec::size, row);
        tiles::store<2>(to + kKeys * s.width, row);
        tiles::store<3>(to + kKeys * s.width + Vec::size, row);
    }

    // One with one or two times kPair.
    template <int Times>
    void weigh_one(int64_t steps, const bfloat16* v, float* to) const {
        const int64_t row = 4 * s.width;  // bytes
        tiles::zero_sums();
        const bfloat16* w = weights.get();
        for (int64_t n = 0; n < steps; ++n, v += tiles::kColumns * s.width, w += 2 * tiles::kSize) {
            tiles::load<4>(w, kPairBytes);
            tiles::load<5>(w + tiles::kSize, kPairBytes);
            tiles::load<6>(v, row);
            tiles::multiply<0, 4, 6>();
            tiles::load<7>(v + kPair, row);
            tiles::multiply<1, 4, 7>();
            tiles::multiply<0, 5, 6>();
            tiles::multiply<1, 5, 7>();
            if constexpr (Times == 2) {
                tiles::load<6>(v + 2 * kPair, row);
                tiles::multiply<2, 4, 6>();
                tiles::load<7>(v + 3 * kPair, row);
                tiles::multiply<3, 4, 7>();
                tiles::multiply<2, 5, 6>();
                tiles::multiply<3, 5, 7>();
            }
        }
        tiles::store<0>(to, row);
        tiles::store<1>(to + Vec::size, row);
        if constexpr (Times == 2) {
            tiles::store<2>(to + kPair, row);
            tiles::store<3>(to + kPair + Vec::size, row);
        }
    }

    // The same where a later key's values are not finite, which a weight of 0 would make NaN: token by token, without what is
    // behind its own. Leaves values of fewer keys.
    void weigh_each(int64_t first, int64_t part, int64_t visible, bool two, float* to) {
        if (!spare) spare = scratch<float>(2 * kKeys * s.width);
        for (int64_t r = 0; r < (1 + two) * kKeys; ++r) {
            if (r == 0 || keys_of(first + r) != keys_of(first + r - 1)) {
                const int64_t own = std::clamp<int64_t>(keys_of(first + r) - part * kPartition, 0, visible);
                interleave(own);
                weigh(own, two, spare.get());
            }
            std::copy_n(spare.get() + r * s.width, s.width, to + r * s.width);
        }
    }

    // Puts `count` rows of a partition behind the partitions before it, in `all` from row `first` on.
    void join(int64_t part, int64_t first, int64_t count, const float* largest, const float* total, const float* values,
              const Result& all) const {
        for (int64_t r = 0; r < count; ++r, values += s.width) {
            if (keys_of(first + r) <= part * kPartition) continue;
            float &to_largest = all.largest[first + r], &to_total = all.total[first + r];
            const float top = std::max(to_largest, largest[r]);
            const Vec old = exp2(Vec::fill(to_largest - top)), added = exp2(Vec::fill(largest[r] - top));
            float lanes[Vec::size];
            fma(added, Vec::fill(total[r]), old * Vec::fill(to_total)).store(lanes);
            to_largest = top;
            to_total = lanes[0];
            float* const to = all.values + (first + r) * s.width;
            for (int64_t c = 0; c < s.width; c += Vec::size)
                fma(added, Vec::load(values + c), old * Vec::load(to + c)).store(to + c);
        }
    }

    void finish(const Result& all) const {
        const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        for (int64_t r = 0; r < t.tokens * s.group; ++r) {
            bfloat16* const to = const_cast<bfloat16*>(row(p.out, r, p.heads * p.head_dim, p.head_dim));
            const bfloat16* gate = p.gate ? row(p.gate, r, p.gate_token, p.gate_head) : nullptr;
            const Vec inverse = Vec::fill(1.0f / all.total[r]);
            const float* const values = all.values + r * s.width;
            for_vectors(p.head_dim, [&](int64_t c, auto part) {
                const float* const pair = values + c / kPair * kPair;
                const __m512 first = _mm512_loadu_ps(pair), second = _mm512_loadu_ps(pair + Vec::size);
                Vec x = Vec{_mm512_permutex2var_ps(first, c % kPair ? high : low, second)} * inverse;
                if (gate) x = x * sigmoid(load(gate + c, part));
                store(x, to + c, part);
            });
        }
    }

    const PagedAttention& p;
    const Shape& s;
    Tile t;
    const Scratch<bfloat16> queries;
    const Scratch<float> scores;               // [2, kPartition, 16]
    const Scratch<bfloat16> weights, values;   // [2, kPartition / 32, parts, 16, 32]; of a partition
    const Scratch<float> memory, some;         // a tile's result; values of 32 rows
    Scratch<bfloat16> copies;                  // of keys, of a partition
    Scratch<float> spare;                      // as `some`
    bool finite;                               // all values of the partition that are interleaved
    KeyRows keys[kPartition / kKeys];
    const bfloat16 *key_rows[kPartition], *value_rows[kPartition];
};

}  // namespace qnext

#endif
