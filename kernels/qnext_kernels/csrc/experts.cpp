// The routed experts: w2 (SiLU(gate x) · up x) of the experts that each token chose, from weights as they are stored or
// packed.
//
// Tokens are sorted by expert. First every expert's gate and up products, in tasks of an expert and a range of columns;
// then the down products, where a thread owns a range of output columns and adds the experts in the order of their
// numbers.
// The limit for few tokens is reading the chosen experts once, for many the rate of fused multiply-adds.
#include <vector>

#include "matmul.h"

namespace qnext {

struct Experts {
    const void* x;   // [tokens, hidden], stride between tokens
    const void* w13; // [experts, 2, middle, hidden], contiguous; each matrix as it is or packed
    const void* w2;  // [experts, hidden, middle], contiguous; each matrix as it is or packed
    const float* weights;
    Indices ids;     // [tokens, top_k]
    void* out;       // [tokens, hidden], contiguous
    int64_t dtype, x_token, tokens, top_k, experts, hidden, middle, packed;
};

namespace {

// The (token, choice) pairs of each chosen expert, sorted by token.
struct Routing {
    std::vector<int64_t> chosen, start, pairs;

    explicit Routing(const Experts& p) : start(p.experts + 1, 0), pairs(p.tokens * p.top_k) {
        std::vector<int64_t> count(p.experts, 0);
        for (int64_t i = 0; i < p.tokens * p.top_k; ++i)
            if (p.ids[i] >= 0) ++count[p.ids[i]];
        for (int64_t e = 0; e < p.experts; ++e) {
            start[e + 1] = start[e] + count[e];
            if (count[e]) chosen.push_back(e);
            count[e] = start[e];
        }
        for (int64_t i = 0; i < p.tokens * p.top_k; ++i)
            if (p.ids[i] >= 0) pairs[count[p.ids[i]]++] = i;
    }
};

template <class T>
class Run {
  public:
    explicit Run(const Experts& p)
        : p(p), routing(p), middle(scratch<T>(routing.pairs.size() * p.middle)),
          total(scratch<float>(p.tokens * p.hidden)) {}

    void run() {
        const int64_t work = routing.start.back() * p.hidden * p.middle;
        const int64_t threads = worth_threads(work) ? omp_get_max_threads() : 1;
        const int64_t chosen = routing.chosen.size(), panels = panels_of(p.middle);
        const int64_t wanted = chosen ? (8 * threads + chosen - 1) / chosen : 1;
        const int64_t at_once = std::max<int64_t>(1, (panels + wanted - 1) / wanted);
        const int64_t ranges = (panels + at_once - 1) / at_once;
#pragma omp parallel num_threads(threads)
        {
            Worker worker(*this);
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < chosen * ranges; ++task) {
                const int64_t first = task % ranges * at_once;
                worker.up(routing.chosen[task / ranges], first, std::min(first + at_once, panels));
            }
            const int64_t columns = panels_of(p.hidden), share = (columns + threads - 1) / threads;
            const int64_t first = std::min(omp_get_thread_num() * share, columns);
            worker.down(first, std::min(first + share, columns));
        }
    }

  private:
    // One thread's.
    class Worker {
      public:
        explicit Worker(const Run& run)
            : p(run.p), routing(run.routing), middle(run.middle.get()), total(run.total.get()), hidden(p.hidden),
              activated(p.middle), memory(scratch<T>(2 * std::max(Matrix<T>::panel_size(p.hidden),
                                                                  Matrix<T>::panel_size(p.middle)))),
              products(std::min<int64_t>(kTokens, routing.pairs.size())) {}

        // middle[pair] = SiLU(gate x) · up x in the columns of panels [first, last), for the tokens of one expert.
        void up(int64_t expert, int64_t first, int64_t last) {
            const T* w = static_cast<const T*>(p.w13) + expert * 2 * p.middle * p.hidden;
            const Matrix<T> gate{w, p.middle, p.hidden, p.packed != 0};
            const Matrix<T> up{w + p.middle * p.hidden, p.middle, p.hidden, p.packed != 0};
            for_blocks(expert, [&](int64_t begin, int64_t count) {
                hidden.take(count, [&](int64_t i) {
                    return static_cast<const T*>(p.x) + routing.pairs[begin + i] / p.top_k * p.x_token;
                });
                for (int64_t panel = first; panel < last; ++panel) {
                    const int64_t column = panel * kPanel;
                    const T* panels[] = {gate.panel(column, memory.get()),
                                         up.panel(column, memory.get() + Matrix<T>::panel_size(p.hidden))};
                    multiply<T>(hidden.rows(), count, panels, 2, p.hidden, products.get());
                    for (int64_t i = 0; i < count; ++i)
                        activate(products.row(0, i), products.row(1, i), std::min(kPanel, p.middle - column),
                                 middle + (begin + i) * p.middle + column);
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

        void add_expert(int64_t expert, int64_t begin, int64_t end) {
            const Matrix<T> weights{static_cast<const T*>(p.w2) + expert * p.hidden * p.middle, p.hidden, p.middle,
                                    p.packed != 0};
            for_blocks(expert, [&](int64_t from, int64_t count) {
                activated.take(count, [&](int64_t i) { return middle + (from + i) * p.middle; });
                for (int64_t column = begin; column < end; column += 2 * kPanel) {
                    const int64_t num_panels = std::min<int64_t>(2, panels_of(end - column));
                    const T* panels[2] = {};
                    for (int64_t n = 0; n < num_panels; ++n)
                        panels[n] = weights.panel(column + n * kPanel,
                                                  memory.get() + n * Matrix<T>::panel_size(p.middle));
                    multiply<T>(activated.rows(), count, panels, num_panels, p.middle, products.get());
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
            float* to = total + pair / p.top_k * p.hidden + column;
            const Vec weight = Vec::fill(p.weights[pair]);
            int64_t d = 0;
            for (; d + Vec::size <= count; d += Vec::size)
                fma(weight, Vec::load(products + d), Vec::load(to + d)).store(to + d);
            for (; d < count; ++d) to[d] = std::fma(p.weights[pair], products[d], to[d]);
        }

        const Experts& p;
        const Routing& routing;
        T* const middle;
        float* const total;
        Activations<T> hidden, activated;
        const Scratch<T> memory;  // two panels
        const Products products;
    };

    const Experts& p;
    const Routing routing;
    Scratch<T> middle;     // [pairs, middle]
    Scratch<float> total;  // [tokens, hidden]
};

}  // namespace
}  // namespace qnext

extern "C" __attribute__((visibility("default"))) void qnext_experts(const qnext::Experts* p) {
    qnext::with_type(p->dtype, [&](auto type) { qnext::Run<decltype(type)>(*p).run(); });
}
