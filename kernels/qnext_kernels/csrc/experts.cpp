// The routed experts: w2 (SiLU(gate x) · up x) of the experts that each token chose, from weights as they are stored.
//
// Tokens are sorted by expert. First every expert's gate and up products, in tasks of an expert and a range of rows; then
// the down products, where a thread owns a range of output columns and adds the experts in the order of their numbers.
// The limit for few tokens is reading the chosen experts once, for many the rate of fused multiply-adds.
#include <vector>

#include "matmul.h"

namespace qnext {

struct Experts {
    const void* x;   // [tokens, hidden], stride between tokens
    const void* w13; // [experts, 2 · middle, hidden], contiguous
    const void* w2;  // [experts, hidden, middle], contiguous
    const float* weights;
    Indices ids;     // [tokens, top_k]
    void* out;       // [tokens, hidden], contiguous
    int64_t dtype, x_token, tokens, top_k, experts, hidden, middle;
};

namespace {

constexpr int64_t kPairs = 64;   // gate and up rows that a block of tokens meets at once
constexpr int64_t kColumns = 128;

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
        const int64_t chosen = routing.chosen.size();
        const int64_t wanted = chosen ? (8 * threads + chosen - 1) / chosen : 1;
        const int64_t rows = std::max(kPairs, (p.middle + wanted - 1) / wanted);
        const int64_t ranges = (p.middle + rows - 1) / rows;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < chosen * ranges; ++task) {
                const int64_t first = task % ranges * rows;
                up(routing.chosen[task / ranges], first, std::min(first + rows, p.middle));
            }
            const int64_t blocks = (p.hidden + kColumns - 1) / kColumns;
            const int64_t per_thread = (blocks + omp_get_num_threads() - 1) / omp_get_num_threads() * kColumns;
            const int64_t first = std::min(omp_get_thread_num() * per_thread, p.hidden);
            down(first, std::min(first + per_thread, p.hidden));
        }
    }

  private:
    using Packed = typename Dot<T>::Packed;

    // middle[pair] = SiLU(gate x) · up x in columns [first, last), for the tokens of one expert.
    void up(int64_t expert, int64_t first, int64_t last) {
        const int64_t begin = routing.start[expert], end = routing.start[expert + 1];
        const int64_t width = packed_width<T>(p.hidden), stride = packed_stride<T>(p.hidden);
        const auto packed = scratch<Packed>(std::min(kTokens, end - begin) * stride);
        const auto products = scratch<float>(std::min(kTokens, end - begin) * 2 * kPairs);
        const T* w = static_cast<const T*>(p.w13) + expert * 2 * p.middle * p.hidden;
        for (int64_t block = begin; block < end; block += kTokens) {
            const int64_t count = std::min(kTokens, end - block);
            for (int64_t i = 0; i < count; ++i) {
                const T* x = static_cast<const T*>(p.x) + routing.pairs[block + i] / p.top_k * p.x_token;
                Dot<T>::pack(x, p.hidden, packed.get() + i * stride, width);
            }
            for (int64_t row = first; row < last; row += kPairs) {
                const int64_t some = std::min(kPairs, last - row);
                const T* rows[2 * kPairs];
                for (int64_t r = 0; r < some; ++r) {
                    rows[r] = w + (row + r) * p.hidden;
                    rows[some + r] = w + (p.middle + row + r) * p.hidden;
                }
                multiply<T>(packed.get(), count, rows, 2 * some, p.hidden, products.get());
                for (int64_t i = 0; i < count; ++i)
                    activate(products.get() + i * 2 * some, some, middle.get() + (block + i) * p.middle + row);
            }
        }
    }

    static void activate(const float* products, int64_t size, T* to) {
        int64_t r = 0;
        for (; r + Vec::size <= size; r += Vec::size)
            (silu(Vec::load(products + r)) * Vec::load(products + size + r)).store(to + r);
        if (r == size) return;
        float gate[Vec::size] = {}, up[Vec::size] = {}, result[Vec::size];
        std::copy_n(products + r, size - r, gate);
        std::copy_n(products + size + r, size - r, up);
        (silu(Vec::load(gate)) * Vec::load(up)).store(result);
        for (int64_t i = r; i < size; ++i) assign(to[i], result[i - r]);
    }

    // Columns [first, last) of the output of every token.
    void down(int64_t first, int64_t last) {
        if (first >= last) return;
        const int64_t width = packed_width<T>(p.middle), stride = packed_stride<T>(p.middle);
        const auto packed = scratch<Packed>(kTokens * stride);
        const auto products = scratch<float>(kTokens * kColumns);
        for (int64_t t = 0; t < p.tokens; ++t)
            std::fill(total.get() + t * p.hidden + first, total.get() + t * p.hidden + last, 0.0f);
        for (const int64_t expert : routing.chosen) {
            const T* w = static_cast<const T*>(p.w2) + expert * p.hidden * p.middle;
            const int64_t end = routing.start[expert + 1];
            for (int64_t block = routing.start[expert]; block < end; block += kTokens) {
                const int64_t count = std::min(kTokens, end - block);
                for (int64_t i = 0; i < count; ++i)
                    Dot<T>::pack(middle.get() + (block + i) * p.middle, p.middle, packed.get() + i * stride, width);
                for (int64_t column = first; column < last; column += kColumns) {
                    const int64_t some = std::min(kColumns, last - column);
                    const T* rows[kColumns];
                    for (int64_t r = 0; r < some; ++r) rows[r] = w + (column + r) * p.middle;
                    multiply<T>(packed.get(), count, rows, some, p.middle, products.get());
                    for (int64_t i = 0; i < count; ++i) add(routing.pairs[block + i], column, some, products.get() + i * some);
                }
            }
        }
        for (int64_t t = 0; t < p.tokens; ++t)
            for (int64_t d = first; d < last; ++d)
                assign(static_cast<T*>(p.out)[t * p.hidden + d], total[t * p.hidden + d]);
    }

    void add(int64_t pair, int64_t column, int64_t count, const float* products) {
        float* to = total.get() + pair / p.top_k * p.hidden + column;
        const Vec weight = Vec::fill(p.weights[pair]);
        int64_t d = 0;
        for (; d + Vec::size <= count; d += Vec::size)
            fma(weight, Vec::load(products + d), Vec::load(to + d)).store(to + d);
        for (; d < count; ++d) to[d] = std::fma(p.weights[pair], products[d], to[d]);
    }

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
