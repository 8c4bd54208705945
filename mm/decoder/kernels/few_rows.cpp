// Products of few rows with large matrices, as in decoding: y = x W^T, at the speed at which W can be read.
//
// A BLAS is made for many rows: with one it reaches 0.6 to 0.8 of the memory's bandwidth here, with eight 0.2 to 0.4
// (benchmarks/few_rows.py). Here each row of W is read once for up to eight rows of x. What is read is two or four long
// streams, each going on from row to row: the processor fetches ahead in them by itself, faster than in one, and than
// in eight that begin anew with every row; with several rows of x it is told to. Every number of y is summed in the same
// order whatever the number of rows: a request gets in a batch, to the last bit, what it gets alone.
//
// At the end of this file it becomes torch's operator mm::few_rows on the CPU, which a compiled program calls directly.

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "lanes.h"

namespace {

constexpr ptrdiff_t BLOCK = 128;            // rows of W that one thread takes at a time, or somewhat fewer
constexpr ptrdiff_t MANY = 4;               // rows of x from which on the processor does not fetch W soon enough by itself
constexpr ptrdiff_t AHEAD_BYTES = 1 << 12;  // and how much sooner it is then told to
constexpr ptrdiff_t X_BYTES = 24 << 10;     // of x: what may stay in the first cache beside what is fetched

// One matrix w (N, K) and the rows of x that go with it, laid out, `padded` numbers each; row[m] is the m-th's in y.
template <typename T>
struct Product {
    const float *x;
    const T *w;
    T *y;
    const ptrdiff_t *row;
    ptrdiff_t rows, N, K, padded;

    // RM rows of x from m, with RN rows of w from n, `apart` rows from one to the next: their numbers begin..end, after
    // those before, whose sums are in `kept`, where these go too until they are complete. With several rows of x, whose
    // products take as long as reading, the same numbers are fetched of what comes `ahead` rows later.
    template <int RM, int RN>
    void tile(ptrdiff_t m0, ptrdiff_t n0, ptrdiff_t apart, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t ahead,
              Lanes *kept) const {
        const T *w = this->w + n0 * K;
        Lanes sum[RN][RM] = {};
        if (begin)
            UNROLL for (int n = 0; n < RN; n++) UNROLL for (int m = 0; m < RM; m++) sum[n][m] = kept[n * RM + m];
        auto row_of_w = [&](int n) { return w + n * apart * K; };
        dots<RM, RN, RM < MANY ? NONE : FIRST, T>(x + m0 * padded, padded, row_of_w, begin, end, K, ahead * K, sum);
        if (end < K) {
            UNROLL for (int n = 0; n < RN; n++) UNROLL for (int m = 0; m < RM; m++) kept[n * RM + m] = sum[n][m];
            return;
        }
        float total[RN * RM];
        totals<RN * RM>(sum[0], total);
        UNROLL for (int n = 0; n < RN; n++)
            UNROLL for (int m = 0; m < RM; m++) store(y + row[m0 + m] * N + n0 + n * apart, total[n * RM + m]);
    }

    // RM rows of x at a time, as often as there are so many; w's rows begin..end in RN parts, a row of each at a time,
    // then what is left over; columns in parts that leave the rows of x in the first cache. Returns the first row of x
    // that is still to do.
    template <int RM, int RN>
    ptrdiff_t sweep(ptrdiff_t m, ptrdiff_t begin, ptrdiff_t end) const {
        const ptrdiff_t part = (end - begin) / RN, x_size = sizeof(decltype(load(w))) / STEP;
        const ptrdiff_t pieces = RM < MANY ? 1 : (RM * K * x_size + X_BYTES - 1) / X_BYTES;
        const ptrdiff_t piece = (K + pieces * STEP - 1) / (pieces * STEP) * STEP;
        const ptrdiff_t ahead = 1 + AHEAD_BYTES / (piece * (ptrdiff_t)sizeof(T) + 1);
        Lanes kept[BLOCK * RM];
        for (; m + RM <= rows; m += RM)
            for (ptrdiff_t k = 0; k < K; k += piece) {
                const ptrdiff_t to = k + piece < K ? k + piece : K;
                for (ptrdiff_t n = 0; n < part; n++)
                    tile<RM, RN>(m, begin + n, part, k, to, ahead, kept + n * RN * RM);
                for (ptrdiff_t n = RN * part; n < end - begin; n++)
                    tile<RM, 1>(m, begin + n, 0, k, to, ahead, kept + n * RM);
            }
        return m;
    }

    void block(ptrdiff_t begin, ptrdiff_t end) const {
        ptrdiff_t m = sweep<8, 2>(0, begin, end);
        m = sweep<4, 2>(m, begin, end);
        m = sweep<2, 4>(m, begin, end);
        sweep<1, 4>(m, begin, end);
    }
};

using torch::stable::Tensor;

// x (M, K), w (E, N, K) and y (M, N); `group` names each row's matrix among the E, or is null where all have the first.
template <typename T>
void multiply(const Tensor &x, const Tensor &w, const Tensor &y, const int64_t *group, ptrdiff_t E) {
    const ptrdiff_t M = y.size(0), N = y.size(1), K = x.size(1), padded = (K + STEP - 1) / STEP * STEP;
    const T *from = (const T *)x.const_data_ptr();
    // Rows in the order of their matrices.
    std::vector<Line> lines((size_t)(M * padded * (ptrdiff_t)sizeof(float)) / sizeof(Line));
    float *rows = lines.data()->x;
    std::vector<ptrdiff_t> row;
    std::vector<Product<T>> products;
    row.reserve((size_t)M);
    for (ptrdiff_t e = 0; e < E; e++) {
        ptrdiff_t begin = (ptrdiff_t)row.size();
        for (ptrdiff_t m = 0; m < M; m++)
            if (!group || group[m] == e) {
                lay_out(from + m * K, rows + (ptrdiff_t)row.size() * padded, K);
                row.push_back(m);
            }
        if (ptrdiff_t count = (ptrdiff_t)row.size() - begin)
            products.push_back({rows + begin * padded, (const T *)w.const_data_ptr() + e * N * K,
                                (T *)y.mutable_data_ptr(), row.data() + begin, count, N, K, padded});
    }
    const ptrdiff_t threads = torch::stable::get_num_threads();
    const ptrdiff_t blocks = (N + BLOCK * threads - 1) / (BLOCK * threads) * threads;
    torch::stable::parallel_for(0, (ptrdiff_t)products.size() * blocks, 1, [&](int64_t task, int64_t last) {
        for (; task < last; task++)
            products[task / blocks].block(N * (task % blocks) / blocks, N * (task % blocks + 1) / blocks);
    });
}

// few_rows.py says what it takes and returns.
Tensor few_rows(Tensor x, Tensor weight, std::optional<Tensor> group) {
    using torch::headeronly::ScalarType;
    const ScalarType dtype = x.scalar_type();
    const bool fits = x.dim() == 2 && weight.dim() == (group ? 3 : 2) && weight.is_contiguous() &&
                      weight.scalar_type() == dtype && weight.size(-1) == x.size(1) &&
                      (!group || (group->scalar_type() == ScalarType::Long && group->numel() == x.size(0)));
    STD_TORCH_CHECK(fits && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
                    "few_rows: x (M, K), weight (N, K) or (E, N, K) with group (M,) int64, all contiguous float32 or "
                    "all bfloat16");
    if (!x.is_contiguous()) x = torch::stable::contiguous(x);
    if (group && !group->is_contiguous()) group = torch::stable::contiguous(*group);
    const std::vector<int64_t> shape = {x.size(0), weight.size(-2)};
    if (!x.size(1)) return torch::stable::new_zeros(x, shape);
    Tensor y = group ? torch::stable::new_zeros(x, shape) : torch::stable::new_empty(x, shape);
    const int64_t *names = group ? (const int64_t *)group->const_data_ptr() : nullptr;
    (dtype == ScalarType::Float ? multiply<float> : multiply<bfloat>)(x, weight, y, names, group ? weight.size(0) : 1);
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mm, CPU, library) { library.impl("few_rows", TORCH_BOX(&few_rows)); }
