// The experts: w2 (SiLU(gate x) · up x) of those that each token chose, and of the shared one, from weights as they are
// stored or packed.
//
// Tokens are sorted by expert; the shared expert is one more, which every token chooses last. First every expert's gate
// and up products, in tasks of an expert and a range of columns; then the down products, which a token adds in the order of
// its experts' numbers: where columns divide evenly among threads, each owns some of the output's and adds to them at once;
// else these are tasks too, and are added up behind them.
// The limit for few tokens is reading the chosen experts once, for many the rate of fused multiply-adds.
#include <algorithm>
#include <vector>

#include "decoder_layer.h"
#include "matmul_tiles.h"

namespace qnext {

namespace {

// The (token, choice) pairs of each chosen expert, sorted by token.
struct Routing {
    std::vector<int64_t> chosen, start, pairs;
    bool valid = true;  // the ids are −1 or experts

    explicit Routing(const Experts& p) : start(p.experts + 2, 0), pairs(p.tokens * p.choices()) {
        std::vector<int64_t> count(p.experts + 1, 0);
        for (int64_t i = 0; i < p.tokens * p.top_k; ++i) {
            if (p.ids[i] < -1 || p.ids[i] >= p.experts) {
                valid = false;
                return;
            }
            if (p.ids[i] >= 0) ++count[p.ids[i]];
        }
        if (p.shared_w13) count[p.experts] = p.tokens;
        for (int64_t e = 0; e <= p.experts; ++e) {
            start[e + 1] = start[e] + count[e];
            if (count[e]) chosen.push_back(e);
            count[e] = start[e];
        }
        for (int64_t t = 0; t < p.tokens; ++t) {
            for (int64_t j = 0; j < p.top_k; ++j)
                if (const int64_t id = p.ids[t * p.top_k + j]; id >= 0) pairs[count[id]++] = t * p.choices() + j;
            if (p.shared_w13) pairs[count[p.experts]++] = t * p.choices() + p.top_k;
        }
    }

    // The chosen experts, those of more than twice as many pairs as others first: no thread begins with one at the end.
    std::vector<int64_t> longest_first() const {
        std::vector<int64_t> experts = chosen;
        const double average = double(pairs.size()) / double(experts.size());
        std::stable_partition(experts.begin(), experts.end(),
                              [&](int64_t expert) { return double(size(expert)) > 2 * average; });
        return experts;
    }

    int64_t size(int64_t expert) const { return start[expert + 1] - start[expert]; }

    // Of each token the places of its pairs in `pairs`, in order; −1 behind the last.
    std::vector<int64_t> places(int64_t tokens) const {
        const int64_t choices = tokens ? int64_t(pairs.size()) / tokens : 0;
        std::vector<int64_t> places(pairs.size(), -1), next(tokens, 0);
        for (int64_t place = 0; place < start.back(); ++place) {
            const int64_t token = pairs[place] / choices;
            places[token * choices + next[token]++] = place;
        }
        return places;
    }
};

template <class T>
float dot(const T* x, const T* y, int64_t size) {
    constexpr int64_t chains = 4, step = chains * Vec::size;
    Vec total[chains];
    for (Vec& each : total) each = Vec::zero();
    const int64_t whole = size / step * step;
    for (int64_t i = 0; i < whole; i += step)
        for (int c = 0; c < chains; ++c)
            total[c] = fma(Vec::load(x + i + c * Vec::size), Vec::load(y + i + c * Vec::size), total[c]);
    for_vectors(size - whole, [&](int64_t i, auto part) {
        total[0] = fma(load(x + whole + i, part), load(y + whole + i, part), total[0]);
    });
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

constexpr int64_t kMostApart = 1 << 18;  // panels of pairs whose products lie apart: 64 MiB

// Tasks of an expert and some of its panels: enough of them that threads end together.
struct Tasks {
    int64_t panels, at_once, ranges, count;

    Tasks(int64_t panels, int64_t experts, int64_t threads) : panels(panels) {
        const int64_t wanted = experts ? (8 * threads + experts - 1) / experts : 1;
        at_once = std::max<int64_t>(1, (panels + wanted - 1) / wanted);
        ranges = (panels + at_once - 1) / at_once;
        count = experts * ranges;
    }
    int64_t expert(int64_t task) const { return task / ranges; }
    int64_t first(int64_t task) const { return task % ranges * at_once; }
    int64_t last(int64_t task) const { return std::min(first(task) + at_once, panels); }
};

// S: of the shared expert's weights, as its activations are, in int8, or stored as the others.
template <class T, class W, class S = W>
class Run {
    static_assert(std::is_same_v<Packed<T, W>, Packed<T, S>>, "all experts read the same activations");

  public:
    explicit Run(const Experts& p)
        : p(p), routing(p), routed(routing.start[p.experts]),
          middle(scratch<T>(routed * p.middle + (p.shared_w13 ? p.tokens * p.shared_middle : 0))),
          total(scratch<float>(p.tokens * p.hidden)), strengths(scratch<float>(p.shared_w13 ? p.tokens : 0)) {}

    // False if an id is no expert; then nothing is written.
    bool run() {
        if (!routing.valid) return false;
        const int64_t work = (routed * p.middle + (p.shared_w13 ? p.tokens * p.shared_middle : 0)) * p.hidden;
        const int64_t threads = worth_threads(work) ? omp_get_max_threads() : 1;
        const int64_t chosen = routing.chosen.size();
        const int64_t panels = panels_of(p.shared_w13 ? std::max(p.middle, p.shared_middle) : p.middle);
        const Tasks up(panels, chosen, threads);
        const std::vector<int64_t> longest_first = routing.longest_first();
        const int64_t columns = panels_of(p.hidden);
        const bool owned = keep_busy(columns, threads);
        const int64_t pairs = routing.start.back();
        const int64_t slices = std::max<int64_t>(1, (pairs * columns + kMostApart - 1) / kMostApart);
        const int64_t slice = (columns + slices - 1) / slices;
        if (!owned) {
            apart = scratch<float>(pairs * slice * kPanel);
            places = routing.places(p.tokens);
        }
#pragma omp parallel num_threads(threads)
        {
            Worker worker(*this);
            if (p.shared_w13) {
#pragma omp for nowait
                for (int64_t t = 0; t < p.tokens; ++t) strengths[t] = strength(t);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < up.count; ++task)
                worker.up(longest_first[up.expert(task)], up.first(task), up.last(task));
            if (owned) {
                const int64_t own = (columns + omp_get_num_threads() - 1) / omp_get_num_threads();
                const int64_t first = std::min(omp_get_thread_num() * own, columns);
                worker.down(first, std::min(first + own, columns));
            } else {
                for (int64_t begin = 0; begin < columns; begin += slice) {
                    const Tasks down(std::min(slice, columns - begin), chosen, threads);
#pragma omp for schedule(dynamic, 1)
                    for (int64_t task = 0; task < down.count; ++task)
                        worker.down_apart(longest_first[down.expert(task)], begin, down.first(task), down.last(task));
#pragma omp for
                    for (int64_t t = 0; t < p.tokens; ++t) add_up(t, begin, std::min(begin + slice, columns));
                }
            }
        }
        return true;
    }

  private:
    // Sigmoid of the shared expert's gate.
    float strength(int64_t token) const {
        const T* x = static_cast<const T*>(p.x) + token * p.x_token;
        return 1.0f / (1.0f + std::exp(-dot(x, static_cast<const T*>(p.shared_gate), p.hidden)));
    }

    template <class M>
    struct Expert {
        Matrix<M> gate, up, down;
        int64_t middle;
        T* rows;  // [pairs of the expert, middle]
    };

    // Calls f with expert `e`.
    template <class F>
    void with_expert(int64_t e, F f) const {
        if (e == p.experts)
            f(stored<S>(p.shared_w13, p.shared_w13_scale, p.shared_w2, p.shared_w2_scale, p.shared_middle, 0,
                        routed * p.middle));
        else
            f(stored<W>(p.w13, p.w13_scale, p.w2, p.w2_scale, p.middle, e, routing.start[e] * p.middle));
    }

    // Expert `e` of those that lie there one behind the other, whose rows begin at `first_row` of the middle's.
    template <class M>
    Expert<M> stored(const void* w13, const void* w13_scale, const void* w2, const void* w2_scale, int64_t middle, int64_t e,
                  int64_t first_row) const {
        const int64_t size = middle * p.hidden;
        const int64_t num_scales = kInGroups<M> ? size / p.group : blocks_of(middle) * blocks_of(p.hidden);
        const auto matrix = [&](const void* data, const void* scales, int64_t n, int64_t rows, int64_t k) {
            return Matrix<M>{static_cast<const M*>(data) + n * stored_in<M>(size), rows, k, p.packed != 0,
                             scales ? static_cast<const Scale<M>*>(scales) + n * num_scales : nullptr, p.group};
        };
        return {matrix(w13, w13_scale, 2 * e, middle, p.hidden), matrix(w13, w13_scale, 2 * e + 1, middle, p.hidden),
                matrix(w2, w2_scale, e, p.hidden, middle), middle, this->middle.get() + first_row};
    }

    static int64_t blocks_of(int64_t size) { return (size + kScaleBlock - 1) / kScaleBlock; }

    // What a token's choice is multiplied with.
    float weight(int64_t token, int64_t choice) const {
        return choice == p.top_k ? strengths[token] : p.weights[token * p.top_k + choice];
    }

    // One thread's.
    class Worker {
      public:
        explicit Worker(const Run& run)
            : p(run.p), run(run), routing(run.routing), total(run.total.get()), hidden(p.hidden), activated(p.middle),
              shared_activated(p.shared_middle),
              memory(scratch<char>(std::max(bytes_of<W>(2, p.middle), bytes_of<S>(2, p.shared_middle)))),
              products(std::min<int64_t>(kTokens, routing.pairs.size())) {}

        // SiLU(gate x) · up x in the columns of panels [first, last), as far as there are, for the tokens of one expert.
        void up(int64_t e, int64_t first, int64_t last) {
            run.with_expert(e, [&](const auto& expert) { up(expert, e, first, last); });
        }

        // The columns of panels [first, last) of the output of every token.
        void down(int64_t first, int64_t last) {
            const int64_t begin = first * kPanel, end = std::min(last * kPanel, p.hidden);
            if (begin >= end) return;
            for (int64_t t = 0; t < p.tokens; ++t)
                std::fill(total + t * p.hidden + begin, total + t * p.hidden + end, 0.0f);
            for (const int64_t e : routing.chosen)
                run.with_expert(e, [&](const auto& expert) { add_expert(expert, e, begin, end); });
            for (int64_t t = 0; t < p.tokens; ++t) {
                T* out = static_cast<T*>(p.out) + t * p.hidden;
                int64_t d = begin;
                for (; d + Vec::size <= end; d += Vec::size) Vec::load(total + t * p.hidden + d).store(out + d);
                for (; d < end; ++d) assign(out[d], total[t * p.hidden + d]);
            }
        }

        // Products of panels [first, last) of the slice from panel `begin` on, to where they lie apart.
        void down_apart(int64_t e, int64_t begin, int64_t first, int64_t last) {
            run.with_expert(e, [&](const auto& expert) { multiply_apart(expert, e, begin, first, last); });
        }

      private:
        // Of so many panels, of whatever an expert multiplies with.
        template <class M>
        int64_t bytes_of(int64_t panels, int64_t middle) const {
            return panels * int64_t(sizeof(M)) * Matrix<M>::panel_size(std::max(p.hidden, middle));
        }

        // Where panel `n` of the two that are packed on the way lies.
        template <class M>
        M* room(int64_t n, int64_t middle) const {
            return reinterpret_cast<M*>(memory.get() + bytes_of<M>(n, middle));
        }

        template <class M>
        void up(const Expert<M>& expert, int64_t e, int64_t first, int64_t last) {
            last = std::min(last, panels_of(expert.middle));
            for_blocks(e, [&](int64_t begin, int64_t count) {
                hidden.take(count, [&](int64_t i) {
                    return static_cast<const T*>(p.x) + routing.pairs[begin + i] / p.choices() * p.x_token;
                });
                T* rows = expert.rows + (begin - routing.start[e]) * expert.middle;
                if (count > kTogether && count <= kFewTiles * kTogether)
                    one_by_one(expert, first, last, count, rows);
                else
                    in_pairs(expert, first, last, count, rows);
            });
        }

        // Calls f(begin, count) for blocks of the pairs of an expert.
        template <class F>
        void for_blocks(int64_t expert, F f) const {
            const int64_t end = routing.start[expert + 1];
            for (int64_t begin = routing.start[expert]; begin < end; begin += kTokens)
                f(begin, std::min(kTokens, end - begin));
        }

        // A panel of gate with its panel of up.
        template <class M>
        void in_pairs(const Expert<M>& expert, int64_t first, int64_t last, int64_t count, T* rows) {
            for (int64_t panel = first; panel < last; ++panel) {
                const int64_t column = panel * kPanel;
                const Panel<M> panels[] = {expert.gate.panel(column, room<M>(0, expert.middle)),
                                           expert.up.panel(column, room<M>(1, expert.middle))};
                multiply<T>(hidden.rows(), count, panels, 2, p.hidden, products.get());
                activate(products.get()[0], products.get()[1], count, expert.middle, column, rows);
            }
        }

        // All panels of gate and then those of up, for so few tokens that memory limits: of one stream a processor foresees
        // more than of two in turns.
        template <class M>
        void one_by_one(const Expert<M>& expert, int64_t first, int64_t last, int64_t count, T* rows) {
            if (const int64_t floats = (last - first) * kFewTiles * kTogether * kPanel; floats > gates_room) {
                gates_room = floats;
                gates = scratch<float>(floats);
            }
            float *const of_up = products.get()[0], *of_gate = gates.get();
            for (int64_t panel = first; panel < last; ++panel, of_gate += count * kPanel) {
                const Panel<M> weights = expert.gate.panel(panel * kPanel, room<M>(0, expert.middle));
                multiply<T>(hidden.rows(), count, &weights, 1, p.hidden, &of_gate);
            }
            of_gate = gates.get();
            for (int64_t panel = first; panel < last; ++panel, of_gate += count * kPanel) {
                const Panel<M> weights = expert.up.panel(panel * kPanel, room<M>(0, expert.middle));
                multiply<T>(hidden.rows(), count, &weights, 1, p.hidden, &of_up);
                activate(of_gate, of_up, count, expert.middle, panel * kPanel, rows);
            }
        }

        // Calls f(activations, from, count, column, panels, how many) for blocks of an expert's pairs and one or two panels of
        // each of the columns [begin, end); start(from, count) before those of a block.
        template <class M, class Start, class F>
        void for_down(const Expert<M>& expert, int64_t e, int64_t begin, int64_t end, Start start, F f) {
            auto& rows = activations_of(expert, e);
            for_blocks(e, [&](int64_t from, int64_t count) {
                rows.take(count, [&](int64_t i) { return expert.rows + (from - routing.start[e] + i) * expert.middle; });
                start(from, count);
                for (int64_t column = begin; column < end; column += 2 * kPanel) {
                    const int64_t num_panels = std::min<int64_t>(2, panels_of(end - column));
                    Panel<M> panels[2] = {};
                    for (int64_t n = 0; n < num_panels; ++n)
                        panels[n] = expert.down.panel(column + n * kPanel, room<M>(n, expert.middle));
                    f(rows.rows(), from, count, column, panels, num_panels);
                }
            });
        }

        template <class M>
        void add_expert(const Expert<M>& expert, int64_t e, int64_t begin, int64_t end) {
            const auto start = [&](int64_t from, int64_t count) {
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t pair = routing.pairs[from + i], token = pair / p.choices();
                    sums[i] = {total + token * p.hidden, run.weight(token, pair % p.choices())};
                }
            };
            for_down(expert, e, begin, end, start,
                     [&](auto rows, int64_t, int64_t count, int64_t column, const Panel<M>* panels, int64_t num_panels) {
                for (int64_t i = 0; i < count; ++i) fetch(sums[i].to + column, std::min(2 * kPanel, end - column));
                multiply<T>(rows, count, panels, num_panels, expert.middle, products.get());
                for (int64_t n = 0; n < num_panels; ++n) {
                    const int64_t place = column + n * kPanel;
                    for (int64_t i = 0; i < count; ++i)
                        add(products.row(n, i), std::min(kPanel, end - place), sums[i].factor, sums[i].to + place);
                }
            });
        }

        template <class M>
        void multiply_apart(const Expert<M>& expert, int64_t e, int64_t begin, int64_t first, int64_t last) {
            const int64_t num_pairs = routing.start.back();
            for_down(expert, e, (begin + first) * kPanel, std::min((begin + last) * kPanel, p.hidden), [](int64_t, int64_t) {},
                     [&](auto rows, int64_t from, int64_t count, int64_t column, const Panel<M>* panels, int64_t num_panels) {
                float* const to = run.apart.get() + ((column / kPanel - begin) * num_pairs + from) * kPanel;
                float* const places[] = {to, to + num_pairs * kPanel};
                multiply<T>(rows, count, panels, num_panels, expert.middle, places);
            });
        }

        template <class M>
        auto& activations_of(const Expert<M>&, int64_t e) {
            if constexpr (std::is_same_v<W, S>) return e == p.experts ? shared_activated : activated;
            else if constexpr (std::is_same_v<M, S>) return shared_activated;
            else return activated;
        }

        // What products are added to, into the second-level cache: they come from anywhere in the output.
        static void fetch(const float* from, int64_t count) {
            for (int64_t i = 0; i < count; i += 16) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T1);
        }

        // Of `count` tokens, the columns of a panel from `column` on.
        static void activate(const float* gate, const float* up, int64_t count, int64_t middle, int64_t column, T* rows) {
            for (int64_t i = 0; i < count; ++i)
                activate(gate + i * kPanel, up + i * kPanel, std::min(kPanel, middle - column), rows + i * middle + column);
        }

        static void activate(const float* gate, const float* up, int64_t size, T* to) {
            int64_t r = 0;
            for (; r + Vec::size <= size; r += Vec::size)
                (silu(Vec::load(gate + r)) * Vec::load(up + r)).store(to + r);
            if (r == size) return;
            // Products behind the last column are zeros.
            float result[Vec::size];
            (silu(Vec::load(gate + r)) * Vec::load(up + r)).store(result);
            for (int64_t i = r; i < size; ++i) assign(to[i], result[i - r]);
        }

        static void add(const float* products, int64_t count, float factor, float* to) {
            const Vec factors = Vec::fill(factor);
            int64_t d = 0;
            for (; d + Vec::size <= count; d += Vec::size)
                fma(factors, Vec::load(products + d), Vec::load(to + d)).store(to + d);
            for (; d < count; ++d) to[d] = std::fma(factor, products[d], to[d]);
        }

        const Experts& p;
        const Run& run;
        const Routing& routing;
        float* const total;
        ActivationsOf<T, W> hidden, activated;
        ActivationsOf<T, S> shared_activated;
        const Scratch<char> memory;  // two panels
        const Products products;
        Scratch<float> gates;     // products of several panels
        int64_t gates_room = 0;
        struct {
            float* to;
            float factor;
        } sums[kTokens];          // of a block of pairs
    };

    // The columns of panels [first, last) of a token's output from products that lie apart, from panel `first` on.
    void add_up(int64_t token, int64_t first, int64_t last) const {
        const int64_t num_pairs = routing.start.back(), choices = p.choices();
        T* const out = static_cast<T*>(p.out) + token * p.hidden;
        for (int64_t panel = first; panel < last; ++panel) {
            Vec sums[kPanelVectors];
            for (Vec& sum : sums) sum = Vec::zero();
            for (int64_t i = token * choices; i < (token + 1) * choices && places[i] >= 0; ++i) {
                const Vec factor = Vec::fill(weight(token, routing.pairs[places[i]] % choices));
                const float* const from = apart.get() + ((panel - first) * num_pairs + places[i]) * kPanel;
                for (int v = 0; v < kPanelVectors; ++v) sums[v] = fma(factor, Vec::load(from + v * Vec::size), sums[v]);
            }
            float result[kPanel];
            for (int v = 0; v < kPanelVectors; ++v) sums[v].store(result + v * Vec::size);
            const int64_t place = panel * kPanel;
            for_vectors(std::min(kPanel, p.hidden - place),
                        [&](int64_t i, auto part) { store(load(result + i, part), out + place + i, part); });
        }
    }

    const Experts& p;
    const Routing routing;
    const int64_t routed;     // pairs of routed experts
    Scratch<float> apart;     // [panels of a slice, pairs, kPanel], down products before they are added up
    std::vector<int64_t> places;  // of them, by tokens
    Scratch<T> middle;        // of their pairs, then of the shared expert's
    Scratch<float> total;     // [tokens, hidden]
    Scratch<float> strengths; // [tokens], of the shared expert
};

// Of weights as they are stored; routed experts are not in int8.
template <class T, class W>
bool run(const Experts& p) {
    if constexpr (std::is_same_v<W, int4<T>>) {
        if (p.shared_stored == kInt8) return Run<T, W, int8<T>>(p).run();
        if (p.shared_stored != p.stored) return Run<T, W, T>(p).run();
    }
    if constexpr (std::is_same_v<W, int8<T>>)
        return false;
    else
        return Run<T, W>(p).run();
}

}  // namespace
}  // namespace qnext

extern "C" bool qnext_experts(const qnext::Experts* p) {
    bool valid = false;
    qnext::with_types(p->dtype, p->stored, [&](auto type, auto weight) {
        valid = qnext::run<decltype(type), decltype(weight)>(*p);
    });
    return valid;
}
