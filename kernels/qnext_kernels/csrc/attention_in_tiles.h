// Attention of bfloat16 over a paged cache with AMX.
//
// A row is a query token with a query head. A partition's keys are turned around and its values put in pairs, once for all rows
// of a tile. Scores become weights beside the products that weight values for the rows before, each as the sum of two bfloat16,
// so that nothing is rounded to bfloat16 but the result. A row's softmax is that of a partition at once; partitions are put
// together in order. Keys behind a row's own get a weight of 0, and those behind the last that a tile sees are not read. So the
// bits of a row's result do not depend on the other rows.
#pragma once

#include <algorithm>
#include <limits>

#include "attention_work.h"
#include "kv_pages.h"
#include "tiles.h"

#if defined(QNEXT_TILES)

namespace qnext {

// One thread's; `rows` of a tile are in whole tiles of AMX.
class TiledWorker {
    static constexpr int64_t kKeys = tiles::kRows, kPairBytes = kPair * 2;
    static constexpr int64_t kForeseen = 144;  // keys
    static constexpr int64_t kTileWeights = 2 * kPartition * kKeys;  // of 16 rows, in two parts
    static_assert(kPair == tiles::kColumns && kPartition % tiles::kColumns == 0);

  public:
    static constexpr int64_t kMostRows = 512;

    // Of a tile's result: of each row the largest score, the sum of the weights, and the values weighted so.
    static int64_t floats(const Shape& s, int64_t tokens) { return rows_of(s, tokens) * (2 + s.width); }

    TiledWorker(const PagedAttention& p, const Shape& s)
        : p(p), s(s), queries(scratch<bfloat16>(rows_of(s, s.tokens) * s.width)),
          scores(scratch<float>(2 * kKeys * kPartition)), weights(scratch<bfloat16>(4 * kTileWeights)),
          keys(scratch<bfloat16>(kPartition * s.width)), values(scratch<bfloat16>(kPartition * s.width)),
          memory(scratch<float>(floats(s, s.tokens))), some(scratch<float>(2 * kKeys * s.width)) {}

    void whole(const Tile& tile, const Parts& next) {
        const tiles::FlushSubnormals flush;
        part({&tile, 0, tile.parts()}, next, memory.get());
        finish(result(memory.get()));
    }

    void part(const Parts& parts, const Parts& next, float* to) {
        begin(*parts.tile);
        const Result all = result(to);
        const tiles::FlushSubnormals flush;
        tiles::configure({kKeys, kKeys, kKeys, kKeys, kKeys, kKeys, kKeys, 0});
        for (int64_t part = parts.first; part < parts.last; ++part) {
            foresee(part + 1 < parts.last ? Parts{parts.tile, part + 1, parts.last} : next);
            attend(part, all, part == parts.first);
        }
        tiles::release();
    }

    void finish_parts(const Tile& tile, float* parts) {
        t = tile;
        const tiles::FlushSubnormals flush;
        const Result all = result(parts);
        for (int64_t i = 1; i < t.parts(); ++i) {
            const Result each = result(parts + i * floats(s, t.tokens));
            join(i, {0, t.tokens * s.group, t.keys}, each.largest, each.total, each.values, all);
        }
        finish(all);
    }

  private:
    struct Result {
        float *largest, *total;  // [rows]
        float* values;           // [rows, width], columns in the order of `twos`
    };

    // One or two tiles of rows, and the keys of a partition that the last of them sees.
    struct Rows {
        int64_t first, count, visible;
        bool two() const { return count > kKeys; }
    };

    // Where 16 rows of keys lie, a stride in elements apart.
    struct KeyRows {
        const bfloat16* data;
        int64_t stride;
    };

    class Softening;

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

    // Few rows do not pay for turning keys around: their queries are turned instead, and then the scores.
    bool few() const { return rows() <= 2 * kKeys; }

    // Queries as the first operand, of few rows as the second.
    void begin(const Tile& tile) {
        t = tile;
        const bfloat16* from[kKeys];
        for (int64_t first = 0; first < rows(); first += kKeys) {
            const int64_t count = std::min(kKeys, t.tokens * s.group - first);
            for (int64_t r = 0; r < count; ++r) from[r] = row(p.q, first + r, p.q_token, p.q_head);
            to_tiles(from, count, few(), queries.get() + first * s.width);
        }
    }

    // Up to 16 rows of the cache or of queries as an operand, [width / 32, 16, 32], or turned around, [width / 32, pairs of
    // columns, 16, 2]; zeros behind the last.
    void to_tiles(const bfloat16* const* from, int64_t count, bool turned, bfloat16* to) const {
        for (int64_t c = 0; c < s.width; c += kPair, to += tiles::kSize) {
            Vec square[kKeys];
            for (int64_t r = 0; r < kKeys; ++r)
                square[r].v = r < count ? _mm512_castsi512_ps(columns(from[r], c)) : _mm512_setzero_ps();
            if (turned) transpose(square);
            for (int64_t r = 0; r < kKeys; ++r) square[r].store(reinterpret_cast<float*>(to) + r * Vec::size);
        }
    }

    void find(const Tile& tile, Kind kind, int64_t part, int64_t count, const bfloat16** to) const {
        Run<bfloat16>(p, kind, tile.sequence, tile.kv_head, part * kPartition, count).next(count, to, nullptr);
    }

    // Some keys of what comes next, which products of few rows with values, that do not wait for memory, leave it time for.
    void foresee(const Parts& next) {
        foreseen = 0;
        if (!few() || !next.tile) return;
        foreseen = std::min(kForeseen, next.tile->keys - next.first * kPartition);
        find(*next.tile, Kind::keys, next.first, foreseen, next_rows);
    }

    // A partition to `all`, or joined to it.
    void attend(int64_t part, const Result& all, bool is_first) {
        const int64_t before = part * kPartition, count = std::min(kPartition, t.keys - before);
        find(t, Kind::keys, part, count, key_rows);
        find(t, Kind::values, part, count, value_rows);
        turned = 0;
        interleaved = false;
        Rows last{};
        alignas(64) float largest[2][2 * kKeys], total[2][2 * kKeys];
        int turn = 0;
        const auto finish_last = [&](Softening& beside) {
            const int before_turn = 1 - turn;
            float* const sums = is_first ? all.values + last.first * s.width : some.get();
            const bfloat16* const w = weights.get() + before_turn * 2 * kTileWeights;
            if (!interleaved) interleave(count);
            interleaved = true;
            if (finite || keys_of(last.first) - before >= count)
                weigh(last, w, sums, beside);
            else
                weigh_each(last, before, w, sums);
            if (!is_first) return join(part, last, largest[before_turn], total[before_turn], sums, all);
            std::copy_n(largest[before_turn], last.count, all.largest + last.first);
            std::copy_n(total[before_turn], last.count, all.total + last.first);
        };
        for (int64_t first = 0; first < t.tokens * s.group; first += 2 * kKeys) {
            const int64_t here = std::min(t.tokens * s.group - first, 2 * kKeys);
            const Rows now{first, here, std::min(keys_of(first + here - 1) - before, count)};
            if (now.visible <= 0) continue;
            few() ? score_few(now, count) : score(now, count);
            Softening softening(*this, now, before, weights.get() + turn * 2 * kTileWeights, largest[turn], total[turn]);
            if (last.count) finish_last(softening);
            softening.finish();
            last = now;
            turn = 1 - turn;
        }
        Softening nothing;
        finish_last(nothing);
    }

    // Values 16 apart side by side, as the second operand: of 32 [width / 16, 16 pairs, 16, 2], columns in the order of `twos`.
    // Notes whether all are finite.
    void interleave(int64_t count) {
        const __m512i exponent = _mm512_set1_epi16(0x7f80);
        __mmask32 special = 0;
        const int64_t end = (count + tiles::kColumns - 1) / tiles::kColumns * tiles::kColumns;
        for (int64_t key = 0; key < end; key += key % kKeys == kKeys - 1 ? kKeys + 1 : 1) {
            const int64_t of_block = key % tiles::kColumns;
            bfloat16* to = values.get() + (key - of_block) * s.width + of_block * kPair;
            for (int64_t c = 0; c < s.width; c += kPair, to += 2 * tiles::kSize) {
                const auto row = [&](int64_t i) { return i < count ? columns(value_rows[i], c) : _mm512_setzero_si512(); };
                const __m512i first = row(key), second = row(key + kKeys);
                for (const __m512i each : {first, second})
                    special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(each, exponent), exponent);
                _mm512_store_si512(to, _mm512_unpacklo_epi16(first, second));
                _mm512_store_si512(to + tiles::kSize, _mm512_unpackhi_epi16(first, second));
            }
        }
        finite = !special;
    }

    // Scores [rows, kPartition], behind the last key of whatever is there.
    void score(const Rows& r, int64_t count) {
        const bfloat16* const q = queries.get() + r.first * s.width;
        const int64_t key_tiles = (r.visible + kKeys - 1) / kKeys, together = r.two() ? 2 : 4;
        const auto at = [&](int64_t n) { return keys.get() + std::min(n, key_tiles - 1) * kKeys * s.width; };
        for (int64_t n = 0; n < key_tiles; n += together) {
            float* const to = scores.get() + n * kKeys;
            for (; turned < std::min(n + together, key_tiles); ++turned) {
                const int64_t key = turned * kKeys;
                to_tiles(key_rows + key, count - key, true, keys.get() + key * s.width);
            }
            if (r.two())
                score_two(q, at(n), at(n + 1), to);
            else
                score_one(q, at(n), at(n + 1), at(n + 2), at(n + 3), to);
        }
    }

    // The same of few rows: keys as they lie, once for all rows.
    void score_few(const Rows& r, int64_t count) {
        for (int64_t key = 0; key < r.visible; key += 4 * kKeys) {
            KeyRows from[4];
            for (int64_t i = 0; i < 4; ++i)
                from[i] = i && key + i * kKeys >= r.visible ? from[0] : key_tile(key + i * kKeys, count);
            for (int64_t tile = 0; tile < 1 + r.two(); ++tile) {
                const int64_t ahead = tile ? count : key + 4 * kKeys;
                score_in_place(queries.get() + tile * kKeys * s.width, from, ahead, count,
                               scores.get() + tile * kKeys * kPartition + key);
            }
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
        bfloat16* const to = keys.get() + key * s.width;
        for (int64_t i = 0; i < kKeys; ++i)
            for (int64_t c = 0; c < s.width; c += kPair)
                _mm512_store_si512(to + i * s.width + c, key + i < count ? columns(from[i], c) : _mm512_setzero_si512());
        return {to, s.width};
    }

    // Four tiles of keys with one of rows: sums of fewer would wait for each other. Fetches keys from `ahead` to `end`.
    void score_in_place(const bfloat16* q, const KeyRows (&from)[4], int64_t ahead, int64_t end, float* to) const {
        tiles::zero_sums();
        tiles::zero<6>();  // which is not used here: as zero it takes no register
        for (int64_t c = 0; c < s.width; c += kPair, q += tiles::kSize) {
            for (int i = 0; i < 8 && ahead < end; ++i) fetch<3>(key_rows[ahead++]);
            tiles::load<5>(q, kPairBytes);
            tiles::load<4>(from[0].data + c, 2 * from[0].stride);
            tiles::multiply<0, 4, 5>();
            tiles::load<4>(from[1].data + c, 2 * from[1].stride);
            tiles::multiply<1, 4, 5>();
            tiles::load<4>(from[2].data + c, 2 * from[2].stride);
            tiles::multiply<2, 4, 5>();
            tiles::load<4>(from[3].data + c, 2 * from[3].stride);
            tiles::multiply<3, 4, 5>();
        }
        alignas(64) float turned[4][kKeys * kKeys];
        tiles::store<0>(turned[0], 64);
        tiles::store<1>(turned[1], 64);
        tiles::store<2>(turned[2], 64);
        tiles::store<3>(turned[3], 64);
        for (int64_t i = 0; i < 4; ++i) {
            Vec square[kKeys];
            for (int64_t r = 0; r < kKeys; ++r) square[r] = Vec::load(turned[i] + r * kKeys);
            transpose(square);
            for (int64_t r = 0; r < kKeys; ++r) square[r].store(to + i * kKeys + r * kPartition);
        }
    }

    // Into the first cache (3) or the second (2).
    template <int Cache>
    void fetch(const bfloat16* row) const {
        for (int64_t c = 0; c < p.head_dim; c += kPair) __builtin_prefetch(row + c, 0, Cache);
    }

    // Two tiles of rows with two of keys.
    void score_two(const bfloat16* q, const bfloat16* a, const bfloat16* b, float* to) const {
        const int64_t row = kPartition * 4;  // bytes
        tiles::zero_sums();
        for (int64_t c = 0; c < s.width * kKeys; c += tiles::kSize) {
            tiles::load<5>(a + c, kPairBytes);
            tiles::load<4>(q + c, kPairBytes);
            tiles::multiply<0, 4, 5>();
            tiles::load<6>(b + c, kPairBytes);
            tiles::multiply<1, 4, 6>();
            tiles::load<4>(q + kKeys * s.width + c, kPairBytes);
            tiles::multiply<2, 4, 5>();
            tiles::multiply<3, 4, 6>();
        }
        tiles::store<0>(to, row);
        tiles::store<1>(to + kKeys, row);
        tiles::store<2>(to + kKeys * kPartition, row);
        tiles::store<3>(to + kKeys * kPartition + kKeys, row);
    }

    // One with four: sums of fewer tiles would wait for each other.
    void score_one(const bfloat16* q, const bfloat16* a, const bfloat16* b, const bfloat16* c, const bfloat16* d,
                   float* to) const {
        const int64_t row = kPartition * 4;  // bytes
        tiles::zero_sums();
        for (int64_t i = 0; i < s.width * kKeys; i += tiles::kSize) {
            tiles::load<4>(q + i, kPairBytes);
            tiles::load<5>(a + i, kPairBytes);
            tiles::multiply<0, 4, 5>();
            tiles::load<5>(b + i, kPairBytes);
            tiles::multiply<1, 4, 5>();
            tiles::load<5>(c + i, kPairBytes);
            tiles::multiply<2, 4, 5>();
            tiles::load<5>(d + i, kPairBytes);
            tiles::multiply<3, 4, 5>();
        }
        tiles::store<0>(to, row);
        tiles::store<1>(to + kKeys, row);
        tiles::store<2>(to + 2 * kKeys, row);
        tiles::store<3>(to + 3 * kKeys, row);
    }

    // 2^x for x of at most 0, with an error of at most 2 ulp; behind −126 no less than float32's least normal number.
    template <int N>
    static QNEXT_INLINE void exp2_below(Vec (&x)[N]) {
        const Vec whole = Vec::fill(12582912.0f);  // behind it float32 has no halves: the last bits count what is added
        Vec rounded[N], y[N];
        unrolled<N>([&](int i) QNEXT_INLINE { x[i] = max(Vec::fill(-126.0f), x[i]); });
        unrolled<N>([&](int i) QNEXT_INLINE { rounded[i] = x[i] + whole; });
        unrolled<N>([&](int i) QNEXT_INLINE { x[i] = x[i] - (rounded[i] - whole); });
        // A polynomial of the least relative error for |x| <= 1/2, and exact at 0.
        unrolled<N>([&](int i) QNEXT_INLINE { y[i] = fma(Vec::fill(1.3203000e-3f), x[i], Vec::fill(9.6749498e-3f)); });
        unrolled<N>([&](int i) QNEXT_INLINE { y[i] = fma(y[i], x[i], Vec::fill(5.5510474e-2f)); });
        unrolled<N>([&](int i) QNEXT_INLINE { y[i] = fma(y[i], x[i], Vec::fill(2.4022166e-1f)); });
        unrolled<N>([&](int i) QNEXT_INLINE { y[i] = fma(y[i], x[i], Vec::fill(6.9314660e-1f)); });
        unrolled<N>([&](int i) QNEXT_INLINE { y[i] = fma(y[i], x[i], Vec::fill(1.0f)); });
        unrolled<N>([&](int i) QNEXT_INLINE {
            const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(rounded[i].v), 23);
            x[i].v = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y[i].v), exponent));
        });
    }

    template <int N, class F>
    static QNEXT_INLINE void unrolled(F f) {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) f(i);
    }

    // Makes weights of the scores of one or two tiles of rows, some at a time: of each row the largest score, weights as the
    // first operand [tiles, keys / 32, parts, 16, 32], and their sum.
    class Softening {
      public:
        Softening() = default;

        Softening(const TiledWorker& w, const Rows& rows, int64_t before, bfloat16* weights, float* largest, float* total)
            : rows(rows), scores(w.scores.get()), weights(weights), total(total),
              scale(Vec::fill(float(w.p.scale * 1.4426950408889634))), left(true) {
            const float never = -std::numeric_limits<float>::infinity();
            for (int64_t r = 0; r < (rows.count + 1) / 2 * 2; ++r) {
                seen[r] = std::clamp<int64_t>(w.keys_of(rows.first + r) - before, 0, rows.visible);
                const float* const from = scores + r * kPartition;
                Vec top = Vec::fill(never);
                int64_t key = 0;
                for (; key + Vec::size <= seen[r]; key += Vec::size) top = max(top, Vec::load(from + key) * scale);
                if (key < seen[r])
                    top.v = _mm512_mask_max_ps(top.v, first_lanes(seen[r] - key), top.v, (Vec::load(from + key) * scale).v);
                largest[r] = qnext::largest(top);
                // Rows that see no key have weights of 0.
                shift[r] = seen[r] ? largest[r] : 0.0f;
                sums[r] = Vec::zero();
            }
        }

        // The weights of 32 keys of two rows, where some are left: two and two keys in 32 bits, 16 apart.
        QNEXT_INLINE void step() {
            if (!left) return;
            Vec x[4];
            unrolled<4>([&](int i) QNEXT_INLINE {
                const float* const from = scores + (row + i / 2) * kPartition + key;
                x[i] = fms(Vec::load(from + i % 2 * Vec::size), scale, Vec::fill(shift[row + i / 2]));
            });
            exp2_below(x);
            if (key + tiles::kColumns > std::min(seen[row], seen[row + 1])) {
                unrolled<4>([&](int i) QNEXT_INLINE {
                    x[i].v = _mm512_maskz_mov_ps(first_lanes(seen[row + i / 2] - key - i % 2 * Vec::size), x[i].v);
                });
            }
            const int64_t tile = row / kKeys;
            bfloat16* const to = weights + tile * kTileWeights + key * 2 * kKeys + (row - tile * kKeys) * kPair;
            const __m512i upper = _mm512_set1_epi32(int(0xffff0000)), half = _mm512_set1_epi32(0x8000);
            unrolled<2>([&](int i) QNEXT_INLINE {
                const Vec first = x[2 * i], second = x[2 * i + 1];
                sums[row + i] = sums[row + i] + (first + second);
                // A float's upper half is a bfloat16; what is missing is one with an error of 2^-16 of the whole.
                const __m512i a = _mm512_castps_si512(first.v), b = _mm512_and_si512(_mm512_castps_si512(second.v), upper);
                _mm512_store_si512(to + i * kPair, _mm512_or_si512(_mm512_srli_epi32(a, 16), b));
                const __m512 rest = _mm512_sub_ps(first.v, _mm512_castsi512_ps(_mm512_and_si512(a, upper)));
                const __m512 rest2 = _mm512_sub_ps(second.v, _mm512_castsi512_ps(b));
                const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(rest), half), 16);
                const __m512i low2 = _mm512_add_epi32(_mm512_castps_si512(rest2), half);
                _mm512_store_si512(to + tiles::kSize + i * kPair, _mm512_ternarylogic_epi32(low2, upper, low, 0xea));
            });
            row += 2;
            if (row < rows.count) return;
            row = 0;
            key += tiles::kColumns;
            if (key < rows.visible) return;
            left = false;
            for (int64_t r = 0; r < rows.count; ++r) total[r] = sum(sums[r]);
        }

        void finish() {
            while (left) step();
        }

      private:
        static __mmask16 first_lanes(int64_t count) { return __mmask16((1u << std::clamp<int64_t>(count, 0, 16)) - 1); }

        const Rows rows{};
        const float* const scores = nullptr;
        bfloat16* const weights = nullptr;
        float* const total = nullptr;
        const Vec scale{};
        bool left = false;
        int64_t row = 0, key = 0, seen[2 * kKeys];
        float shift[2 * kKeys];
        Vec sums[2 * kKeys];
    };

    // to [16 a tile, width] = the values of keys times their weights, in one or two tiles of rows.
    void weigh(const Rows& r, const bfloat16* w, float* to, Softening& beside) {
        const int64_t steps = (r.visible + tiles::kColumns - 1) / tiles::kColumns;
        const bfloat16* v = values.get();
        for (int64_t c = 0; c < s.width;) {
            const int64_t more = r.two() || c + kPair == s.width ? kPair : 2 * kPair;
            if (r.two())
                weigh_two(steps, v, w, to + c, beside);
            else if (more > kPair)
                weigh_one<2>(steps, v, w, to + c);
            else
                weigh_one<1>(steps, v, w, to + c);
            c += more;
            v += more * tiles::kColumns;
        }
    }

    // Two tiles of rows with kPair columns.
    void weigh_two(int64_t steps, const bfloat16* v, const bfloat16* w, float* to, Softening& beside) const {
        const int64_t row = 4 * s.width;  // bytes
        tiles::zero_sums();
        for (int64_t n = 0; n < steps; ++n, v += tiles::kColumns * s.width) {
            tiles::load<5>(v, kPairBytes);
            tiles::load<6>(v + tiles::kSize, kPairBytes);
            for (int part = 0; part < 2; ++part, w += tiles::kSize) {
                tiles::load<4>(w, kPairBytes);
                tiles::multiply<0, 4, 5>();
                tiles::multiply<1, 4, 6>();
                tiles::load<4>(w + kTileWeights, kPairBytes);
                tiles::multiply<2, 4, 5>();
                tiles::multiply<3, 4, 6>();
                beside.step();
            }
        }
        tiles::store<0>(to, row);
        tiles::store<1>(to + Vec::size, row);
        tiles::store<2>(to + kKeys * s.width, row);
        tiles::store<3>(to + kKeys * s.width + Vec::size, row);
    }

    // One with one or two times kPair.
    template <int Times>
    void weigh_one(int64_t steps, const bfloat16* v, const bfloat16* w, float* to) {
        const int64_t row = 4 * s.width;  // bytes
        tiles::zero_sums();
        for (int64_t n = 0; n < steps; ++n, v += tiles::kColumns * s.width, w += 2 * tiles::kSize) {
            for (int i = 0; i < 2 && foreseen; ++i) fetch<2>(next_rows[--foreseen]);
            tiles::load<4>(w, kPairBytes);
            tiles::load<6>(v, kPairBytes);
            tiles::multiply<0, 4, 6>();
            tiles::load<5>(w + tiles::kSize, kPairBytes);
            tiles::multiply<0, 5, 6>();
            tiles::load<6>(v + tiles::kSize, kPairBytes);
            tiles::multiply<1, 4, 6>();
            tiles::multiply<1, 5, 6>();
            if constexpr (Times == 2) {
                tiles::load<6>(v + 2 * tiles::kSize, kPairBytes);
                tiles::multiply<2, 4, 6>();
                tiles::multiply<2, 5, 6>();
                tiles::load<6>(v + 3 * tiles::kSize, kPairBytes);
                tiles::multiply<3, 4, 6>();
                tiles::multiply<3, 5, 6>();
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
    void weigh_each(const Rows& r, int64_t before, const bfloat16* w, float* to) {
        if (!spare) spare = scratch<float>(2 * kKeys * s.width);
        Softening nothing;
        for (int64_t i = 0; i < r.count; ++i) {
            const int64_t own = std::clamp<int64_t>(keys_of(r.first + i) - before, 0, r.visible);
            if (i == 0 || keys_of(r.first + i) != keys_of(r.first + i - 1)) {
                interleave(own);
                weigh({r.first, r.count, own}, w, spare.get(), nothing);
            }
            std::copy_n(spare.get() + i * s.width, s.width, to + i * s.width);
        }
        interleaved = false;
    }

    // Puts rows of a partition behind the partitions before it.
    void join(int64_t part, const Rows& rows, const float* largest, const float* total, const float* values,
              const Result& all) const {
        for (int64_t r = 0; r < rows.count; ++r, values += s.width) {
            const int64_t row = rows.first + r;
            if (keys_of(row) <= part * kPartition) continue;
            float &to_largest = all.largest[row], &to_total = all.total[row];
            const float top = std::max(to_largest, largest[r]);
            const Vec old = exp2(Vec::fill(to_largest - top)), added = exp2(Vec::fill(largest[r] - top));
            float lanes[Vec::size];
            fma(added, Vec::fill(total[r]), old * Vec::fill(to_total)).store(lanes);
            to_largest = top;
            to_total = lanes[0];
            float* const to = all.values + row * s.width;
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
    const Scratch<float> scores;                    // [32, kPartition]
    const Scratch<bfloat16> weights, keys, values;  // [2, 2, kPartition / 32, parts, 16, 32]; of a partition
    const Scratch<float> memory, some;              // a tile's result; values of 32 rows
    Scratch<float> spare;                           // as `some`
    int64_t turned;                                 // tiles of keys of the partition
    bool interleaved, finite;                       // all values of the partition; those that are interleaved
    int64_t foreseen = 0;                           // of `next_rows`, yet to be fetched
    const bfloat16 *key_rows[kPartition], *value_rows[kPartition], *next_rows[kForeseen];
};

}  // namespace qnext

#endif
