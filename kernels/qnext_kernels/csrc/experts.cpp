// The experts: w2 (SiLU(gate x) · up x) of those that each token chose, and of the shared one, from weights as they are
// stored or packed.
//
// Tokens are sorted by expert; the shared expert is one more, which every token chooses last. First every expert's gate
// and up products, in tasks of an expert and a range of columns; then the down products, where a thread owns a range of
// output columns and adds the experts in the order of their numbers.
// The limit for few tokens is reading the chosen experts once, for many the rate of fused multiply-adds.
#include <vector>

#include "decoder_layer.h"
#include "matmul.h"

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

template <class T>
class Run {
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
        const int64_t wanted = chosen ? (8 * threads + chosen - 1) / chosen : 1;
        const int64_t at_once = std::max<int64_t>(1, (panels + wanted - 1) / wanted);
        const int64_t ranges = (panels + at_once - 1) / at_once;
#pragma omp parallel num_threads(threads)
        {
            Worker worker(*this);
            if (p.shared_w13) {
#pragma omp for nowait
                for (int64_t t = 0; t < p.tokens; ++t) strengths[t] = strength(t);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < chosen * ranges; ++task) {
                const int64_t first = task % ranges * at_once;
                worker.up(routing.chosen[task / ranges], first, first + at_once);
            }
            const int64_t columns = panels_of(p.hidden), share = (columns + threads - 1) / threads;
            const int64_t first = std::min(omp_get_thread_num() * share, columns);
            worker.down(first, std::min(first + share, columns));
        }
        return true;
    }

  private:
    // Sigmoid of the shared expert's gate.
    float strength(int64_t token) const {
        const T* x = static_cast<const T*>(p.x) + token * p.x_token;
        return 1.0f / (1.0f + std::exp(-dot(x, static_cast<const T*>(p.shared_gate), p.hidden)));
    }

    struct Expert {
        const T *w13, *w2;
        int64_t middle;
        T* rows;  // [pairs of the expert, middle]
    };

    Expert expert(int64_t e) const {
        if (e == p.experts)
            return {static_cast<const T*>(p.shared_w13), static_cast<const T*>(p.shared_w2), p.shared_middle,
                    middle.get() + routed * p.middle};
        return {static_cast<const T*>(p.w13) + e * 2 * p.middle * p.hidden,
                static_cast<const T*>(p.w2) + e * p.hidden * p.middle, p.middle, middle.get() + routing.start[e] * p.middle};
    }

    // What a token's choice is multiplied with.
    float weight(int64_t pair) const {
        const int64_t token = pair / p.choices(), choice = pair % p.choices();
        return choice == p.top_k ? strengths[token] : p.weights[token * p.top_k + choice];
    }

    // One thread's.
    class Worker {
      public:
        explicit Worker(const Run& run)
            : p(run.p), run(run), routing(run.routing), total(run.total.get()), hidden(p.hidden), activated(p.middle),
              shared_activated(p.shared_middle),
              memory(scratch<T>(2 * std::max({Matrix<T>::panel_size(p.hidden), Matrix<T>::panel_size(p.middle),
                                              Matrix<T>::panel_size(p.shared_middle)}))),
              products(std::min<int64_t>(kTokens, routing.pairs.size())) {}

        // SiLU(gate x) · up x in the columns of panels [first, last), as far as there are, for the tokens of one expert.
        void up(int64_t e, int64_t first, int64_t last) {
            const Expert expert = run.expert(e);
            const Matrix<T> gate{expert.w13, expert.middle, p.hidden, p.packed != 0};
            const Matrix<T> up{expert.w13 + expert.middle * p.hidden, expert.middle, p.hidden, p.packed != 0};
            for_blocks(e, [&](int64_t begin, int64_t count) {
                hidden.take(count, [&](int64_t i) {
                    return static_cast<const T*>(p.x) + routing.pairs[begin + i] / p.choices() * p.x_token;
                });
                T* rows = expert.rows + (begin - routing.start[e]) * expert.middle;
                for (int64_t panel = first; panel < std::min(last, panels_of(expert.middle)); ++panel) {
                    const int64_t column = panel * kPanel;
                    const T* panels[] = {gate.panel(column, memory.get()),
                                         up.panel(column, memory.get() + Matrix<T>::panel_size(p.hidden))};
                    multiply<T>(hidden.rows(), count, panels, 2, p.hidden, products.get());
                    for (int64_t i = 0; i < count; ++i)
                        activate(products.row(0, i), products.row(1, i), std::min(kPanel, expert.middle - column),
                                 rows + i * expert.middle + column);
                }
            });
        }

        // The columns of panels [first, last) of the output of every token.
        void down(int64_t first, int64_t last) {
            const int64_t begin = first * kPanel, end = std::min(last * kPanel, p.hidden);
            if (begin >= end) return;
            for (int64_t t = 0; t < p.tokens; ++t)
                std::fill(total + t * p.hidden + begin, total + t * p.hidden + end, 0.0f);
            for (const int64_t expert : routing.chosen) add_expert(expert, begin, end);
            for (int64_t t = 0; t < p.tokens; ++t) {
                T* out = static_cast<T*>(p.out) + t * p.hidden;
                int64_t d = begin;
                for (; d + Vec::size <= end; d += Vec::size) Vec::load(total + t * p.hidden + d).store(out + d);
                for (; d < end; ++d) assign(out[d], total[t * p.hidden + d]);
            }
        }

      private:
        // Calls f(begin, count) for blocks of the pairs of an expert.
        template <class F>
        void for_blocks(int64_t expert, F f) const {
            const int64_t end = routing.start[expert + 1];
            for (int64_t begin = routing.start[expert]; begin < end; begin += kTokens)
                f(begin, std::min(kTokens, end - begin));
        }

        void add_expert(int64_t e, int64_t begin, int64_t end) {
            const Expert expert = run.expert(e);
            const Matrix<T> weights{expert.w2, p.hidden, expert.middle, p.packed != 0};
            Activations<T>& rows = e == p.experts ? shared_activated : activated;
            for_blocks(e, [&](int64_t from, int64_t count) {
                rows.take(count, [&](int64_t i) { return expert.rows + (from - routing.start[e] + i) * expert.middle; });
                for (int64_t column = begin; column < end; column += 2 * kPanel) {
                    const int64_t num_panels = std::min<int64_t>(2, panels_of(end - column));
                    const T* panels[2] = {};
                    for (int64_t n = 0; n < num_panels; ++n)
                        panels[n] = weights.panel(column + n * kPanel,
                                                  memory.get() + n * Matrix<T>::panel_size(expert.middle));
                    multiply<T>(rows.rows(), count, panels, num_panels, expert.middle, products.get());
                    for (int64_t n = 0; n < num_panels; ++n) {
                        const int64_t place = column + n * kPanel;
                        for (int64_t i = 0; i < count; ++i)
                            add(routing.pairs[from + i], place, std::min(kPanel, end - place), products.row(n, i));
                    }
                }
            });
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

        void add(int64_t pair, int64_t column, int64_t count, const float* products) const {
            float* to = total + pair / p.choices() * p.hidden + column;
            const float factor = run.weight(pair);
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
        Activations<T> hidden, activated, shared_activated;
        const Scratch<T> memory;  // two panels
        const Products products;
    };

    const Experts& p;
    const Routing routing;
    const int64_t routed;     // pairs of routed experts
    Scratch<T> middle;        // of their pairs, then of the shared expert's
    Scratch<float> total;     // [tokens, hidden]
    Scratch<float> strengths; // [tokens], of the shared expert
};

}  // namespace
}  // namespace qnext

extern "C" bool qnext_experts(const qnext::Experts* p) {
    bool valid = false;
    qnext::with_type(p->dtype, [&](auto type) { valid = qnext::Run<decltype(type)>(*p).run(); });
    return valid;
}
