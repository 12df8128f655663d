// Row-major matrix products on the CPU: tiles of C that are summed in registers, over blocks of A and B that
// were copied in the order in which the tiles read them (Goto, van de Geijn, Anatomy of high-performance
// matrix multiplication, 2008).
//
// An element of C is summed over the inner dimension in an order that depends on that dimension alone: the
// same bits with any number of threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

namespace gdn {

namespace tiles {

// Widest vectors of the machine that the program is compiled for, and rows of a tile: a tile of kRows rows
// and two vectors, one more row of B and an element of A fit its registers.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 8;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRows = 6;
#else
constexpr int kVectorBytes = 16, kRows = 6;
#endif
constexpr int kDepth = 256;                          // of the inner dimension in a block
constexpr int kBlockRows = 3072, kBlockCols = 4096;  // of A and B that are copied at a time
constexpr int kUnitRows = 12 * kRows;                // of C, that a thread computes at a time
constexpr int kUnitCols = 256;

template <class Real>
struct Vector {
  typedef Real type __attribute__((vector_size(kVectorBytes), aligned(alignof(Real)), may_alias));
  static constexpr int size = kVectorBytes / int(sizeof(Real));
};

template <class Real>
constexpr int columns() {  // of a tile
  return 2 * Vector<Real>::size;
}

// sum [rows,columns()] = a [rows,depth] b [depth,columns()], rows <= kRows, in registers. Element (i, l) of a
// is a[i * row_step + l * depth_step]; rows of b are `ldb` apart. Then c [rows,columns()] = alpha sum + beta
// c.
template <int rows, class Real>
void product(Real* c, int64_t ldc, const Real* a, int64_t row_step, int64_t depth_step, const Real* b,
             int64_t ldb, int depth, Real alpha, Real beta) {
  using V = typename Vector<Real>::type;
  constexpr int n = Vector<Real>::size;
  V sum[rows][2] = {};
  for (int l = 0; l < depth; l++) {
    const V b0 = *reinterpret_cast<const V*>(b + l * ldb), b1 = *reinterpret_cast<const V*>(b + l * ldb + n);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      const Real x = a[i * row_step + l * depth_step];
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
    for (int half = 0; half < 2; half++) {
      V* out = reinterpret_cast<V*>(c + i * ldc + half * n);
      *out = beta == 0 ? alpha * sum[i][half] : alpha * sum[i][half] + beta * *out;
    }
}

// The same where C has `rows` x `cols` elements there, fewer than a tile; a and b are padded.
template <class Real>
void product_at_edge(Real* c, int64_t ldc, int rows, int cols, const Real* a, const Real* b, int depth,
                     Real alpha, Real beta) {
  Real sum[kRows * columns<Real>()];
  product<kRows>(sum, columns<Real>(), a, 1, kRows, b, columns<Real>(), depth, alpha, Real(0));
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j++) {
      Real& out = c[i * ldc + j];
      out = sum[i * columns<Real>() + j] + (beta == 0 ? Real(0) : beta * out);
    }
}

// Copies `width` lines of `depth` elements as [depth][padded], zeros in the padding. Element (i, l) is
// from[i * line_step + l * depth_step], one of the steps being 1.
template <int padded, class Real>
void copy_panel(Real* to, const Real* from, int64_t line_step, int64_t depth_step, int width, int depth) {
  if (width < padded) std::fill_n(to, size_t(depth) * padded, Real(0));
  if (line_step == 1 && width == padded)
    for (int l = 0; l < depth; l++)
      for (int i = 0; i < padded; i++) to[l * padded + i] = from[i + l * depth_step];
  else if (line_step == 1)
    for (int l = 0; l < depth; l++)
      for (int i = 0; i < width; i++) to[l * padded + i] = from[i + l * depth_step];
  else
    for (int i = 0; i < width; i++)
      for (int l = 0; l < depth; l++) to[l * padded + i] = from[i * line_step + l];
}

// c [m,n] += alpha a [m,k] b [k,n], c and b dense, without copies: for small matrices. Element (i, l) of a is
// a[i * row_step + l * depth_step].
template <class Real>
void add_product(Real* c, const Real* a, int64_t row_step, int64_t depth_step, const Real* b, int m, int k,
                 int n, Real alpha) {
  const int full = n / columns<Real>() * columns<Real>();
  int i = 0;
  for (; i + kRows <= m; i += kRows)
    for (int j = 0; j < full; j += columns<Real>())
      product<kRows>(c + i * n + j, n, a + i * row_step, row_step, depth_step, b + j, n, k, alpha, Real(1));
  for (int row = 0; row < m; row++)
    for (int l = 0; l < k; l++) {
      const Real x = alpha * a[row * row_step + l * depth_step];
#pragma omp simd
      for (int j = row < i ? full : 0; j < n; j++) c[row * n + j] += x * b[l * n + j];
    }
}

// `n` uninitialised numbers that begin at a vector's boundary.
template <class Real>
class Panels {
 public:
  explicit Panels(size_t n) : data_(static_cast<Real*>(::operator new(n * sizeof(Real), kAlignment))) {}
  ~Panels() { ::operator delete(data_, kAlignment); }
  Panels(const Panels&) = delete;
  Panels& operator=(const Panels&) = delete;
  Real* operator+(size_t offset) const { return data_ + offset; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  Real* data_;
};

}  // namespace tiles

// C [m,n] = alpha op(A) [m,k] op(B) [k,n] + beta C, all row-major; beta = 0 never reads C.
template <class Real>
void cpu_gemm(bool ta, bool tb, int m, int n, int k, Real alpha, const Real* a, int64_t lda, const Real* b,
              int64_t ldb, Real beta, Real* c, int64_t ldc) {
  using namespace tiles;
  if (m == 1 && tb && !ta) {  // a vector's: B is read once, where it is
#pragma omp parallel for schedule(static)
    for (int j = 0; j < n; j++) {
      Real sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int l = 0; l < k; l++) sum += a[l] * b[j * ldb + l];
      c[j] = alpha * sum + (beta == 0 ? Real(0) : beta * c[j]);
    }
    return;
  }
  constexpr int kCols = columns<Real>();
  const int64_t a_row = ta ? 1 : lda, a_depth = ta ? lda : 1, b_depth = tb ? 1 : ldb, b_col = tb ? ldb : 1;
  const auto panels = [](int size, int each) { return (size + each - 1) / each; };
  const int deepest = std::min(k, kDepth);
  const int row_panels = panels(std::min(m, kBlockRows), kRows),
            col_panels = panels(std::min(n, kBlockCols), kCols);
  const Panels<Real> a_block(size_t(row_panels) * kRows * deepest),
      b_block(size_t(col_panels) * kCols * deepest);
#pragma omp parallel
  for (int col = 0; col < n; col += kBlockCols)
    for (int row = 0; row < m; row += kBlockRows)
      for (int l0 = 0; l0 < k || l0 == 0; l0 += kDepth) {
        const int rows = std::min(kBlockRows, m - row), cols = std::min(kBlockCols, n - col);
        const int depth = std::min(kDepth, k - l0);
#pragma omp for schedule(dynamic, 4) nowait
        for (int p = 0; p < panels(rows, kRows); p++)
          copy_panel<kRows>(a_block + size_t(p) * kRows * depth, a + (row + p * kRows) * a_row + l0 * a_depth,
                            a_row, a_depth, std::min(kRows, rows - p * kRows), depth);
#pragma omp for schedule(dynamic, 4)
        for (int p = 0; p < panels(cols, kCols); p++)
          copy_panel<kCols>(b_block + size_t(p) * kCols * depth, b + (col + p * kCols) * b_col + l0 * b_depth,
                            b_col, b_depth, std::min(kCols, cols - p * kCols), depth);
#pragma omp for collapse(2) schedule(dynamic)
        for (int j0 = 0; j0 < cols; j0 += kUnitCols)
          for (int i0 = 0; i0 < rows; i0 += kUnitRows)
            for (int j = j0; j < std::min(j0 + kUnitCols, cols); j += kCols)
              for (int i = i0; i < std::min(i0 + kUnitRows, rows); i += kRows) {
                const Real *a_panel = a_block + size_t(i) * depth, *b_panel = b_block + size_t(j) * depth;
                Real* out = c + (row + i) * ldc + col + j;
                const Real before = l0 == 0 ? beta : Real(1);
                if (i + kRows <= rows && j + kCols <= cols)
                  product<kRows>(out, ldc, a_panel, 1, kRows, b_panel, kCols, depth, alpha, before);
                else
                  product_at_edge(out, ldc, std::min(kRows, rows - i), std::min(kCols, cols - j), a_panel,
                                  b_panel, depth, alpha, before);
              }
      }
}

}  // namespace gdn
