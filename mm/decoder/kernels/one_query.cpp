// Attention of one query a row, as in decoding: y = softmax(scale q K^T) V, at the speed at which the cache can be read.
//
// torch's makes matrix products of it, with a BLAS that on some processors knows none of their vectors: 4 to 8 GB/s on
// one that reads 40 (benchmarks/one_query.py). Here a task takes BLOCK of the keys that its row sees, those of one
// key/value head with all queries that share it, and leaves a maximum, a sum and a weighted sum of values; what the
// tasks of a row leave is put together at the end. Keys that a row does not see are never read, and what it gets does
// not depend, to the last bit, on what stands beside it, on padding or on the number of threads.
//
// At the end of this file it becomes torch's operator mm::one_query on the CPU, which a compiled program calls directly.

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "lanes.h"

namespace {

constexpr ptrdiff_t BLOCK = 256;            // keys of a task
constexpr ptrdiff_t AHEAD_BYTES = 1 << 14;  // of keys or values: how much sooner they are fetched

// e^x for x <= 0, to two units in the last place, and 1e-38 where it is less than that; NaN stays NaN.
inline Lanes exponential(Lanes x) {
    const Lanes one = Lanes{} + 1.0f, half = one * 0.5f, least = one * -87.0f, round = one * 12582912.0f;
    x = x < least ? least : x;
    const Lanes turns = fused(x, one * 1.44269504f, round);  // the nearest whole number stands in the lowest bits
    const Lanes n = turns - round;
    const Lanes r = fused(n, one * 2.12194440e-4f, fused(n, one * -0.693359375f, x));
    Lanes p = fused(r, one * (1.0f / 720), one * (1.0f / 120));
    p = fused(r, p, one * (1.0f / 24));
    p = fused(r, p, one * (1.0f / 6));
    p = fused(r, fused(r, fused(r, p, half), one), one);
    const Lanes scaled = (Lanes)((Bits)p + ((Bits)turns << 23));
    return x == x ? scaled : x;
}

template <typename T>
struct Attention {
    const T *k, *v;
    ptrdiff_t k_row, k_key, k_head, v_row, v_key, v_head;  // numbers from one to the next
    ptrdiff_t D, E, R, padded_d, padded_e;                 // R queries share a key/value head
    float scale, softcap;
    const float *q;  // laid out

    // What a task leaves of each of its R queries: the maximum, the sum, and the sum of values in `widen`'s order.
    ptrdiff_t left() const { return padded_e + 2 * LANES; }

    // Keys or values, of so many numbers each, that come before what is fetched now.
    static ptrdiff_t ahead(ptrdiff_t numbers) { return AHEAD_BYTES / (numbers * (ptrdiff_t)sizeof(T)); }

    template <int RM, int RN>
    ptrdiff_t score(const float *q, const T *keys, const ptrdiff_t *columns, ptrdiff_t s, ptrdiff_t count,
                    float *scores) const {
        for (; s + RN <= count; s += RN) {
            const T *rows[RN];
            Lanes sum[RN][RM] = {};
            UNROLL for (int n = 0; n < RN; n++) rows[n] = keys + columns[s + n] * k_key;
            dots<RM, RN, SECOND, T>(q, padded_d, [&](int n) { return rows[n]; }, 0, D, D, ahead(D) * k_key, sum);
            float total[RN * RM];
            totals<RN * RM>(sum[0], total);
            UNROLL for (int n = 0; n < RN; n++)
                UNROLL for (int m = 0; m < RM; m++) scores[m * BLOCK + s + n] = total[n * RM + m];
        }
        return s;
    }

    // Scores to their exponentials, and what is left of them: scores[count..] is 0 up to a whole vector.
    void soften(float *scores, ptrdiff_t count, float *to) const {
        constexpr float least = -std::numeric_limits<float>::infinity();
        for (ptrdiff_t s = count; s % LANES; s++) scores[s] = least;
        Lanes highest = Lanes{} + least;
        for (ptrdiff_t s = 0; s < count; s += LANES) {
            Lanes x = *(Lanes *)(scores + s) * scale;
            if (softcap)
                for (ptrdiff_t i = 0; i < LANES; i++) x[i] = softcap * std::tanh(x[i] / softcap);
            *(Lanes *)(scores + s) = x;
            highest = x > highest ? x : highest;
        }
        float most = least;
        for (ptrdiff_t i = 0; i < LANES; i++) most = highest[i] > most ? highest[i] : most;
        Lanes sum[1] = {};
        for (ptrdiff_t s = 0; s < count; s += LANES) {
            *(Lanes *)(scores + s) = exponential(*(Lanes *)(scores + s) - most);
            if (s + LANES > count)
                for (ptrdiff_t rest = count; rest < s + LANES; rest++) scores[rest] = 0;
            sum[0] += *(Lanes *)(scores + s);
        }
        to[0] = most;
        totals<1>(sum, to + 1);
    }

    // RM queries' sums of PAIRS * STEP numbers of the values; of the last ones, if not WHOLE, only `rest` are there.
    template <int RM, int PAIRS, bool WHOLE>
    void weigh(const float *scores, const T *values, const ptrdiff_t *columns, ptrdiff_t count, ptrdiff_t rest,
               float *to) const {
        Pair sum[RM][PAIRS] = {};
        T filled[STEP] = {};
        for (ptrdiff_t s = 0; s < count; s++) {
            const T *row = values + columns[s] * v_key;
            if (!WHOLE) memcpy(filled, row, (size_t)rest * sizeof *row);
            UNROLL for (int i = 0; i < PAIRS; i++) {
                Pair value = widen(WHOLE ? row + i * STEP : filled);
                if (WHOLE) fetch<SECOND>(row + ahead(E) * v_key + i * STEP);
                hold(value);
                UNROLL for (int m = 0; m < RM; m++) {
                    const Lanes p = scores[m * BLOCK + s] - Lanes{};  // in all lanes
                    sum[m][i].a = fused(p, value.a, sum[m][i].a);
                    sum[m][i].b = fused(p, value.b, sum[m][i].b);
                }
            }
        }
        UNROLL for (int m = 0; m < RM; m++)
            UNROLL for (int i = 0; i < PAIRS; i++) {
                *(Lanes *)(to + m * left() + i * STEP) = sum[m][i].a;
                *(Lanes *)(to + m * left() + i * STEP + LANES) = sum[m][i].b;
            }
    }

    template <int RM, int RN, int PAIRS>
    ptrdiff_t queries(ptrdiff_t r, const float *q, const T *keys, const T *values, const ptrdiff_t *columns,
                      ptrdiff_t count, float *scores, float *to) const {
        for (; r + RM <= R; r += RM) {
            const float *mine = q + r * padded_d;
            float *result = to + r * left();
            ptrdiff_t s = score<RM, RN>(mine, keys, columns, 0, count, scores);
            score<RM, 1>(mine, keys, columns, s, count, scores);
            for (int m = 0; m < RM; m++) soften(scores + m * BLOCK, count, result + m * left() + padded_e);
            ptrdiff_t e = 0;
            for (; e + PAIRS * STEP <= E; e += PAIRS * STEP)
                weigh<RM, PAIRS, true>(scores, values + e, columns, count, 0, result + e);
            for (; e + STEP <= E; e += STEP) weigh<RM, 1, true>(scores, values + e, columns, count, 0, result + e);
            if (e < E) weigh<RM, 1, false>(scores, values + e, columns, count, E - e, result + e);
        }
        return r;
    }

    // The keys `columns` of a row and a key/value head, with its R queries.
    void task(ptrdiff_t row, ptrdiff_t head, ptrdiff_t heads, const ptrdiff_t *columns, ptrdiff_t count,
              float *to) const {
        alignas(64) float scores[8 * BLOCK];
        const float *mine = q + (row * heads + head) * R * padded_d;
        const T *keys = k + row * k_row + head * k_head, *values = v + row * v_row + head * v_head;
        ptrdiff_t r = queries<8, 2, 1>(0, mine, keys, values, columns, count, scores, to);
        r = queries<4, 2, 1>(r, mine, keys, values, columns, count, scores, to);
        r = queries<2, 4, 2>(r, mine, keys, values, columns, count, scores, to);
        queries<1, 4, 2>(r, mine, keys, values, columns, count, scores, to);
    }
};

using torch::stable::Tensor;

struct Task {
    ptrdiff_t row, head, column, count;
};

template <typename T>
void attend(const Tensor &q, const Tensor &k, const Tensor &v, const bool *seen, float scale, float softcap,
            const float *sinks, const Tensor &y) {
    const ptrdiff_t B = q.size(0), H = q.size(1), D = q.size(2), S = k.size(1), G = k.size(2), E = v.size(3), R = H / G;
    const ptrdiff_t padded_d = (D + STEP - 1) / STEP * STEP, padded_e = (E + STEP - 1) / STEP * STEP;
    std::vector<Line> laid((size_t)(B * H * padded_d * (ptrdiff_t)sizeof(float)) / sizeof(Line));
    float *queries = laid.data()->x;
    for (ptrdiff_t i = 0; i < B * H; i++) lay_out((const T *)q.const_data_ptr() + i * D, queries + i * padded_d, D);
    std::vector<ptrdiff_t> columns;
    std::vector<Task> tasks;
    std::vector<ptrdiff_t> tasks_of = {0};  // of each row, and where they begin
    columns.reserve((size_t)(seen ? B * S : S));
    for (ptrdiff_t b = 0; b < B; b++) {
        const ptrdiff_t begin = seen || !b ? (ptrdiff_t)columns.size() : 0;
        if (seen || !b)
            for (ptrdiff_t s = 0; s < S; s++)
                if (!seen || seen[b * S + s]) columns.push_back(s);
        const ptrdiff_t end = (ptrdiff_t)columns.size();
        for (ptrdiff_t g = 0; g < G; g++)
            for (ptrdiff_t c = begin; c < end; c += BLOCK)
                tasks.push_back({b, g, c, end - c < BLOCK ? end - c : BLOCK});
        tasks_of.push_back((ptrdiff_t)tasks.size());
    }
    const Attention<T> a = {(const T *)k.const_data_ptr(), (const T *)v.const_data_ptr(), k.stride(0), k.stride(1),
                            k.stride(2), v.stride(0), v.stride(1), v.stride(2), D, E, R, padded_d, padded_e, scale,
                            softcap, queries};
    std::vector<Line> kept(tasks.size() * (size_t)(R * a.left()) * sizeof(float) / sizeof(Line));
    float *left = kept.empty() ? nullptr : kept.data()->x;
    torch::stable::parallel_for(0, (int64_t)tasks.size(), 1, [&](int64_t i, int64_t last) {
        for (; i < last; i++)
            a.task(tasks[i].row, tasks[i].head, G, columns.data() + tasks[i].column, tasks[i].count,
                   left + i * R * a.left());
    });
    // A row's tasks stand head by head, as many for each.
    torch::stable::parallel_for(0, B * H, 64, [&](int64_t i, int64_t last) {
        for (; i < last; i++) {
            const ptrdiff_t b = i / H, h = i % H, each = (tasks_of[b + 1] - tasks_of[b]) / G;
            const float *mine = left + ((tasks_of[b] + h / R * each) * R + h % R) * a.left();
            float most = sinks ? sinks[h] : -std::numeric_limits<float>::infinity(), sum = 0;
            for (ptrdiff_t j = 0; j < each; j++) {
                const float here = mine[j * R * a.left() + padded_e];
                most = here > most ? here : most;
            }
            if (sinks) sum = std::exp(sinks[h] - most);
            std::vector<float> weights((size_t)each);
            for (ptrdiff_t j = 0; j < each; j++) {
                const float *part = mine + j * R * a.left() + padded_e;
                weights[j] = std::exp(part[0] - most);
                sum += weights[j] * part[1];
            }
            T *to = (T *)y.mutable_data_ptr() + i * E;
            for (ptrdiff_t e = 0; e < E; e++) {
                float total = 0;
                for (ptrdiff_t j = 0; j < each; j++) total += weights[j] * mine[j * R * a.left() + place(e, T())];
                store(to + e, each ? total / sum : 0);
            }
        }
    });
}

// one_query.py says what it takes and returns.
Tensor one_query(Tensor q, Tensor k, Tensor v, std::optional<Tensor> seen, double scale, double softcap,
                 std::optional<Tensor> sinks) {
    using torch::headeronly::ScalarType;
    const ScalarType dtype = q.scalar_type();
    const bool shapes = q.dim() == 3 && k.dim() == 4 && v.dim() == 4 && k.size(0) == q.size(0) &&
                        v.size(0) == q.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2) && k.size(2) &&
                        q.size(1) % k.size(2) == 0 && k.size(3) == q.size(2) && k.size(3) && v.size(3);
    const bool kinds = k.scalar_type() == dtype && v.scalar_type() == dtype &&
                       (dtype == ScalarType::Float || dtype == ScalarType::BFloat16);
    STD_TORCH_CHECK(shapes && kinds && k.stride(3) == 1 && v.stride(3) == 1,
                    "one_query: q (B, H, d), k (B, S, G, d) and v (B, S, G, e), H a multiple of G, all float32 or all "
                    "bfloat16, heads' numbers side by side");
    STD_TORCH_CHECK(!seen || (seen->scalar_type() == ScalarType::Bool && seen->dim() == 2 &&
                              seen->size(0) == q.size(0) && seen->size(1) == k.size(1)),
                    "one_query: seen (B, S) bool");
    STD_TORCH_CHECK(!sinks || (sinks->scalar_type() == ScalarType::Float && sinks->dim() == 1 &&
                               sinks->size(0) == q.size(1)),
                    "one_query: sinks (H,) float32");
    if (!q.is_contiguous()) q = torch::stable::contiguous(q);
    if (seen && !seen->is_contiguous()) seen = torch::stable::contiguous(*seen);
    if (sinks && !sinks->is_contiguous()) sinks = torch::stable::contiguous(*sinks);
    Tensor y = torch::stable::new_empty(q, std::vector<int64_t>{q.size(0), q.size(1), v.size(3)});
    (dtype == ScalarType::Float ? attend<float> : attend<bfloat>)(
        q, k, v, seen ? (const bool *)seen->const_data_ptr() : nullptr, (float)scale, (float)softcap,
        sinks ? (const float *)sinks->const_data_ptr() : nullptr, y);
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mm, CPU, library) { library.impl("one_query", TORCH_BOX(&one_query)); }
