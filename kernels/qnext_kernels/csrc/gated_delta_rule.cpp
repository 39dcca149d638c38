// The gated delta rule. Verify and decode run token by token, the same steps, so they have the same bits. A prefill runs
// in blocks of 16 tokens (delta_chunk.h) and token by token behind the last whole block, or token by token altogether
// where its bits must not depend on how it is split.
//
// Rows of the state are independent of each other, and a few of them stay in the first-level cache for a tile of tokens.
// Token by token the physical limit is 4 vector operations an element of the state; a decode reads and writes the state
// once.
#include <algorithm>
#include <vector>

#include "delta_keys.h"

namespace qnext {
namespace {

using namespace delta;

constexpr int kGroups = 8;          // groups of kRows that go through a tile together: steps of one would wait for each other
constexpr int kChunk = 64;          // where a split prefill would round the state
constexpr int kRecurrentTokens = 4; // a last chunk of at most so many tokens rounds behind each, as decodes do
constexpr int kVerifyGroups = 2;    // groups that a verify takes through all tokens before the next
constexpr int kRows = 4;
// Elements of the state that are fetched ahead, measured: what lies behind is the next head's.
constexpr int kAhead = Vec::size == 16 ? 1280 : 2048;

struct Token {
    float decay, beta, kq;  // kq: k · q
};

// Where a step leaves the state: in the caches, for the next, or past them, where it is not read before long.
enum class To { kCache, kMemory, kBoth };

// One token's step for kRows rows of the state, from `src` to `dst` (which may be the same) and past the caches to `kept`.
// Fetches: `src` is read out of memory; lines are asked for evenly, half of them in either loop.
//   S' = decay S + δ kᵀ with δ = β (v − decay S k);  o = S' q = decay S q + δ (k · q)
template <bool Fetches, To to>
inline void step(const float* src, float* dst, float* kept, int64_t stride, const float* k, const float* q, Token token,
                 const float* v, float* o) {
    Vec sk[kRows], sq[kRows];
    for (int r = 0; r < kRows; ++r) sk[r] = sq[r] = Vec::zero();
    const auto fetch = [&](int r, int64_t i) {
        if constexpr (Fetches)
            _mm_prefetch(reinterpret_cast<const char*>(src + r * stride + i + kAhead), _MM_HINT_T0);
    };
    for (int64_t i = 0; i < stride; i += Vec::size) {
        const Vec ki = Vec::load(k + i), qi = Vec::load(q + i);
        for (int r = 0; r < kRows; ++r) {
            if (r < kRows / 2) fetch(r, i);
            const Vec s = Vec::load(src + r * stride + i);
            sk[r] = fma(s, ki, sk[r]);
            sq[r] = fma(s, qi, sq[r]);
        }
    }
    alignas(16) float delta[kRows];
    const __m128 decay = _mm_set1_ps(token.decay);
    const __m128 held = _mm_mul_ps(decay, sums(sk[0], sk[1], sk[2], sk[3]));
    const __m128 d = _mm_mul_ps(_mm_sub_ps(_mm_loadu_ps(v), held), _mm_set1_ps(token.beta));
    _mm_store_ps(delta, d);
    const __m128 old = _mm_mul_ps(decay, sums(sq[0], sq[1], sq[2], sq[3]));
    _mm_storeu_ps(o, _mm_fmadd_ps(d, _mm_set1_ps(token.kq), old));
    const Vec decays = Vec::fill(token.decay);
    Vec deltas[kRows];
    for (int r = 0; r < kRows; ++r) deltas[r] = Vec::fill(delta[r]);
    for (int64_t i = 0; i < stride; i += Vec::size) {
        const Vec ki = Vec::load(k + i);
        for (int r = 0; r < kRows; ++r) {
            if (r >= kRows / 2) fetch(r, i);
            const Vec s = fma(ki, deltas[r], Vec::load(src + r * stride + i) * decays);
            if constexpr (to != To::kMemory) s.store(dst + r * stride + i);
            if constexpr (to != To::kCache) s.stream(kept + r * stride + i);
        }
    }
}

// Rows in whole tiles.
inline int64_t tiled_rows(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

// Memory of this thread, which it keeps from call to call: the system would clear it anew each time.
inline float* kept_floats(int64_t count) {
    static thread_local Scratch<float> kept;
    static thread_local int64_t size = 0;
    if (size < count) kept = scratch<float>(size = count);
    return kept.get();
}

// Rows `first` to `last` of one value head of one sequence. S: of the state, P: of the step pool.
template <class T, class S, class P>
class Head {
  public:
    // The heads of a tile are [of_tile, of_tile + in_tile).
    // tiles: for tiled_rows(last - first) rows; state: for whole groups of rows.
    Head(const KeyTile<T>& tile, int64_t sequence, int64_t head, int64_t of_tile, int64_t in_tile, int64_t first,
         int64_t last, float* tiles, float* state)
        : p(tile.p), tile(tile), n(sequence), head(head), place_in_tile(head - of_tile), in_tile(in_tile), first(first),
          rows(last - first), width(tile.width),
          row_groups((rows + kRows - 1) / kRows), state(state), tiles(tiles) {}

    // Before the tokens [begin, end), from the state in `slot`.
    void begin_prefill(int64_t begin, int64_t end, int64_t slot, bool starts_at_zero) {
        this->begin = begin;
        this->end = end;
        own = place(slot);
        const int64_t snapshot_slot = p.snapshot_slots.at(n, -1);
        snapshot = snapshot_slot < 0 ? nullptr : place(snapshot_slot);
        snapshot_at = snapshot ? begin + p.snapshot_lengths[n] : -1;
        direct = in_place<S>() && begin < end;
        current = direct ? reinterpret_cast<float*>(own) : state;
        is_zero = in_tiles = starts_at_zero && !p.recurrent && end - begin >= kBlockTokens;
        if (in_tiles) std::fill_n(tiles, tiled_rows(rows) * width, 0.0f);
        if (starts_at_zero && !(in_tiles && direct))
            std::fill_n(current, row_groups * kRows * width, 0.0f);
        else if (!starts_at_zero && !direct)
            load(own);
    }

    // Tokens [start, stop), which the tile holds; all at once in `block`, if there is one.
    void prefill(int64_t start, int64_t stop, DeltaBlock* block) {
        if (start == snapshot_at) {
            leave_tiles();
            store(current, snapshot);
        }
        const int64_t chunk = begin + (start - begin) / kChunk * kChunk;
        const bool rounds = std::min(chunk + kChunk, end) - chunk <= kRecurrentTokens;
        prepare(start, stop);
        if (block) {
            advance_block(start, *block);
        } else {
            leave_tiles();
            advance_tokens(start, stop, rounds);
        }
        if (stop == end || (stop - begin) % kChunk == 0)
            in_tiles ? round<S>(tiles, tiled_rows(rows)) : round<S>(state, row_groups * kRows);
    }

    void end_prefill() {
        leave_tiles();
        if (end == snapshot_at) store(current, snapshot);
        if (!direct && begin < end) store(current, own);
    }

    // Before the tokens [begin, end).
    void begin_verify(int64_t begin, int64_t end, int64_t slot) {
        this->begin = begin;
        this->end = end;
        direct = in_place<S>() && (!p.steps || in_place<P>());
        current = direct ? reinterpret_cast<float*>(place(slot)) : state;
        if (!direct) load(place(slot));
    }

    // The state behind token t goes to its place; the next token continues from what a pool can hold.
    void verify(int64_t start, int64_t stop) {
        prepare(start, stop);
        if (direct) return verify_in_place(start, stop);
        for (int64_t t = start; t < stop; ++t) {
            for (int64_t g = 0; g < row_groups; ++g) {
                advance<true, To::kCache>(g, t, t - start, current, state, nullptr);
                p.steps ? round_group<P>(g) : round_group<S>(g);
            }
            current = state;
            if (P* step = step_place(t - begin)) store(state, step);
            if (S* target = p.steps ? nullptr : slot_place(t - begin)) store(state, target);
        }
    }

    // Zeros for tokens [begin, end).
    static void clear(const DeltaRule& p, int64_t head, int64_t first, int64_t last, int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            T* row = static_cast<T*>(p.out) + (t * p.value_heads + head) * p.value_dim;
            std::memset(row + first, 0, (last - first) * sizeof(T));
        }
    }

  private:
    // The pool holds floats in whole vectors and groups of rows: steps can read and write it where it lies.
    template <class Pool>
    bool in_place() const {
        return std::is_same_v<Pool, float> && width == p.key_dim && rows % kRows == 0;
    }

    void advance_tokens(int64_t start, int64_t stop, bool rounds) {
        Tokens next = next_tokens(stop, (row_groups + kGroups - 1) / kGroups);
        for (int64_t first_group = 0; first_group < row_groups; first_group += kGroups) {
            next.fetch();
            for (int64_t t = start; t < stop; ++t) {
                for (int64_t g = first_group; g < std::min(first_group + kGroups, row_groups); ++g) {
                    advance<true, To::kCache>(g, t, t - start, current, current, nullptr);
                    if (rounds) round_group<S>(g);
                }
            }
        }
    }

    // What this head fetches of the tile of tokens that begins at `start`, in so many steps.
    struct Tokens {
        LinesAhead<T> values, keys, queries;
        QNEXT_INLINE void fetch() { values.step(), keys.step(), queries.step(); }
    };

    // Of its values all, of the keys and queries its part.
    Tokens next_tokens(int64_t start, int64_t steps) const {
        const int64_t count = std::clamp<int64_t>(end - start, 0, kTile);
        const int64_t from = count * place_in_tile / in_tile, shared = count * (place_in_tile + 1) / in_tile - from;
        return {{value(start), p.v_token, count, rows, steps},
                {tile.key(start + from), p.k_token, shared, p.key_dim, steps},
                {tile.query(start + from), p.q_token, shared, p.key_dim, steps}};
    }

    // All tokens of a tile of tokens at once.
    void advance_block(int64_t start, DeltaBlock& block) {
        block.prepare(log_decay, beta);
        Tokens next = next_tokens(start + kTile, tiled_rows(rows) / kTileRows * block.steps());
        const int64_t o_token = p.value_heads * p.value_dim;
        const bool enters = !in_tiles, leaves = start + 2 * kTile > end || start + kTile == snapshot_at;
        for_tiles([&](int64_t row, int64_t count, float* tile) {
            // Those that the next tile is made of, or that this one becomes.
            const float* const fetched = current + (enters ? row + count : row) * width;
            LinesAhead<float> state_rows(fetched, width, enters || leaves ? kTileRows : 0, width, block.steps());
            if (enters) to_tile(current + row * width, count, width, tile);
            block.advance(tile, is_zero, count, value(start) + row, p.v_token, out(start) + row, o_token, [&]() QNEXT_INLINE {
                next.fetch();
                state_rows.step();
            });
            if (leaves) from_tile(tile, count, width, current + row * width);
        });
        in_tiles = !leaves;
        is_zero = false;
    }

    // The state is in `current` again.
    void leave_tiles() {
        if (in_tiles)
            for_tiles([&](int64_t row, int64_t count, float* tile) { from_tile(tile, count, width, current + row * width); });
        in_tiles = false;
    }

    template <class F>
    void for_tiles(F f) const {
        for (int64_t row = 0; row < rows; row += kTileRows)
            f(row, std::min<int64_t>(kTileRows, rows - row), tiles + row * width);
    }

    // All tokens of a few rows before the next rows: moving memory overlaps with the work.
    void verify_in_place(int64_t start, int64_t stop) {
        if (start == stop) return;
        float *places[kTile], *behind = current;
        for (int64_t t = start; t < stop; ++t) {
            float* const step = reinterpret_cast<float*>(step_place(t - begin));
            places[t - start] = p.steps ? step : reinterpret_cast<float*>(slot_place(t - begin));
        }
        for (int64_t first_group = 0; first_group < row_groups; first_group += kVerifyGroups) {
            const int64_t last_group = std::min(first_group + kVerifyGroups, row_groups);
            const float* from = current;
            for (int64_t t = start; t < stop; ++t) {
                float* const place = places[t - start];
                // Past the caches, but not over what has just been read into them.
                const bool streams = place && place != current && reinterpret_cast<uintptr_t>(place) % sizeof(Vec) == 0;
                behind = place && !streams ? place : state;
                for (int64_t g = first_group; g < last_group; ++g) {
                    if (t == start)
                        streams ? advance<true, To::kBoth>(g, t, 0, from, behind, place)
                                : advance<true, To::kCache>(g, t, 0, from, behind, nullptr);
                    else if (!streams)
                        advance<false, To::kCache>(g, t, t - start, from, behind, nullptr);
                    else if (t + 1 < end)
                        advance<false, To::kBoth>(g, t, t - start, from, behind, place);
                    else
                        advance<false, To::kMemory>(g, t, t - start, from, nullptr, place);
                }
                from = behind;
            }
        }
        current = behind;
    }

    const T* value(int64_t t) const { return static_cast<const T*>(p.v) + t * p.v_token + head * p.v_head + first; }

    T* out(int64_t t) const { return static_cast<T*>(p.out) + (t * p.value_heads + head) * p.value_dim + first; }

    S* place(int64_t slot) const {
        return static_cast<S*>(p.state) + slot * p.state_slot + (head * p.value_dim + first) * p.key_dim;
    }

    S* slot_place(int64_t t) const {
        const int64_t slot = p.slots[n * p.slot_columns + t];
        return slot < 0 ? nullptr : place(slot);
    }

    P* step_place(int64_t t) const {
        const int64_t row = p.step_rows.at(n, -1);
        if (!p.steps || row < 0) return nullptr;
        P* step = static_cast<P*>(p.steps) + row * p.steps_row + t * p.steps_step;
        return step + (head * p.value_dim + first) * p.key_dim;
    }

    void load(const S* from) {
        for (int64_t r = 0; r < row_groups * kRows; ++r) {
            if (r < rows)
                load_row(from + r * p.key_dim, p.key_dim, state + r * width, width);
            else
                std::fill_n(state + r * width, width, 0.0f);
        }
    }

    template <class Pool>
    void store(const float* from, Pool* to) const {
        for (int64_t r = 0; r < rows; ++r) store_row(from + r * width, p.key_dim, to + r * p.key_dim);
    }

    // What a pool can hold of so many rows.
    template <class Pool>
    void round(float* from, int64_t rows) const {
        if constexpr (!std::is_same_v<Pool, float>) {
            for (float* x = from; x < from + rows * width; x += Vec::size) {
                Pool rounded[Vec::size];
                Vec::load(x).store(rounded);
                Vec::load(rounded).store(x);
            }
        }
    }

    template <class Pool>
    void round_group(int64_t g) const {
        round<Pool>(state + g * kRows * width, kRows);
    }

    // Gates of tokens [start, stop), those of a vector together; behind the last they are computed of zeros.
    void prepare(int64_t start, int64_t stop) {
        const int64_t count = stop - start;
        const Vec rate = Vec::fill(-std::exp(p.A_log[head])), bias = Vec::fill(p.dt_bias[head]);
        for (int64_t first = 0; first < count; first += Vec::size) {
            float a[Vec::size] = {}, b[Vec::size] = {};
            for (int64_t i = 0; i < std::min<int64_t>(Vec::size, count - first); ++i) {
                a[i] = p.a[(start + first + i) * p.a_token + head];
                b[i] = p.b[(start + first + i) * p.b_token + head];
            }
            const Vec g = rate * softplus(Vec::load(a) + bias);
            g.store(log_decay + first);
            exp(g).store(decay + first);
            sigmoid(Vec::load(b)).store(beta + first);
        }
    }

    // Group g of the rows at `from` becomes that at `dst` and `kept` behind token t.
    template <bool Fetches, To to>
    void advance(int64_t g, int64_t t, int64_t in_tile, const float* from, float* dst, float* kept) {
        const int64_t count = std::min<int64_t>(kRows, rows - g * kRows);
        const T* v_from = value(t) + g * kRows;
        T* out = this->out(t) + g * kRows;
        float v[kRows] = {}, o[kRows];
        for (int64_t r = 0; r < count; ++r) v[r] = to_float(v_from[r]);
        const int64_t offset = g * kRows * width;
        if constexpr (to != To::kMemory) dst += offset;
        if constexpr (to != To::kCache) kept += offset;
        const Token token{decay[in_tile], beta[in_tile], tile.kq[in_tile]};
        step<Fetches, to>(from + offset, dst, kept, width, tile.keys + in_tile * width,
                          tile.queries + in_tile * width, token, v, o);
        for (int64_t r = 0; r < count; ++r) assign(out[r], o[r]);
    }

    const DeltaRule& p;
    const KeyTile<T>& tile;
    const int64_t n, head, place_in_tile, in_tile, first, rows, width, row_groups;
    float* const state;                 // where it is not advanced in its pool
    float* const tiles;                 // [tiles, width, kTileRows]: the state while blocks go on
    alignas(64) float log_decay[kTile], decay[kTile], beta[kTile];
    int64_t begin = 0, end = 0, snapshot_at = -1;
    S *own = nullptr, *snapshot = nullptr;
    float* current = nullptr;
    bool direct = false, in_tiles = false, is_zero = false;  // in_tiles, is_zero: the state is
};

// Rows [first, last) of the value heads [from, to) of a sequence, which share a key head.
template <class T, class S, class P>
void run(const DeltaRule& p, int64_t n, int64_t from, int64_t to, int64_t first, int64_t last) {
    const int64_t begin = p.query_start_loc.at(n, n), end = p.query_start_loc.at(n + 1, n + 1);
    const int64_t accepted = std::clamp<int64_t>(p.accepted.at(n, 1), 1, p.slot_columns);
    const int64_t slot = p.slots[n * p.slot_columns + accepted - 1];
    if (slot < 0) {
        for (int64_t head = from; head < to; ++head) Head<T, S, P>::clear(p, head, first, last, begin, end);
        return;
    }
    const int64_t width = padded(p.key_dim), shared = (KeyTile<T>::kFloats + DeltaBlock::kFloats) * width;
    const int64_t of_state = (last - first + kRows - 1) / kRows * kRows * width;
    const int64_t of_tiles = p.every_token || p.recurrent ? 0 : tiled_rows(last - first) * width;
    float* kept = kept_floats(shared + (to - from) * (of_state + of_tiles));
    KeyTile<T> tile(p, from / (p.value_heads / p.key_heads), kept);
    DeltaBlock block(tile.block, kept + KeyTile<T>::kFloats * width);
    kept += shared;
    std::vector<Head<T, S, P>> heads;
    heads.reserve(to - from);
    for (int64_t head = from; head < to; ++head, kept += of_state + of_tiles)
        heads.emplace_back(tile, n, head, from, to - from, first, last, kept, kept + of_tiles);
    for (auto& head : heads) {
        if (p.every_token)
            head.begin_verify(begin, end, slot);
        else
            head.begin_prefill(begin, end, slot, p.has_initial && !p.has_initial[n]);
    }
    for (int64_t start = begin; start < end; start += kTile) {
        const int64_t stop = std::min(start + kTile, end);
        const bool whole = stop - start == kBlockTokens && !p.every_token && !p.recurrent;
        whole ? tile.prepare_block(start) : tile.prepare_tokens(start, stop);
        if (p.every_token) {
            for (auto& head : heads) head.verify(start, stop);
            continue;
        }
        for (auto& head : heads) head.prefill(start, stop, whole ? &block : nullptr);
    }
    if (p.every_token)
        _mm_sfence();  // what was streamed comes before what tells others that this is done
    else
        for (auto& head : heads) head.end_prefill();
}

template <class T, class S, class P>
void delta_rule(const DeltaRule& p) {
    const int64_t group = p.value_heads / p.key_heads, threads = omp_get_max_threads();
    const int64_t tokens = p.query_start_loc.at(p.sequences, p.sequences);
    // All value heads of a key head together if there are enough for every thread: what they share is then prepared once.
    const int64_t at_once = p.sequences * p.key_heads < 2 * threads ? 1 : group;
    const int64_t units = p.sequences * p.value_heads / at_once;
    int64_t parts = 1;
    while (units * parts < 2 * threads && p.value_dim / (2 * parts) >= 8 * kRows) parts *= 2;
    const int64_t rows = (p.value_dim + parts - 1) / parts, units_of_sequence = p.value_heads / at_once;
#pragma omp parallel for schedule(dynamic, 1) if (worth_threads(tokens * p.value_heads * p.value_dim * p.key_dim))
    for (int64_t task = 0; task < units * parts; ++task) {
        const int64_t first = task % parts * rows, unit = task / parts;
        const int64_t head = unit % units_of_sequence * at_once;
        if (first < p.value_dim)
            run<T, S, P>(p, unit / units_of_sequence, head, head + at_once, first, std::min(first + rows, p.value_dim));
    }
}

}  // namespace
}  // namespace qnext

void qnext_gated_delta_rule(const qnext::DeltaRule* p) {
    using namespace qnext;
    with_type(p->dtype, [&](auto token) {
        with_type(p->state_dtype, [&](auto state) {
            with_type(p->steps_dtype, [&](auto step) { delta_rule<decltype(token), decltype(state), decltype(step)>(*p); });
        });
    });
}
