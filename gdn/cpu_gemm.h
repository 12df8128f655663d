// Row-major matrix products on the CPU: OpenBLAS where the Makefile found it (GDN_OPENBLAS), else blocked
// loops.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>
#ifdef GDN_OPENBLAS
#include <cblas.h>
#endif

namespace gdn {

namespace blocked {

constexpr int kRows = 32, kCols = 256,
              kDepth = 128;  // a block of C, and how much of the inner dimension at a time

// Copies block [rows, cols] at (row, col) of op(A) into `out` with row stride `stride`.
template <class Real>
void pack(Real* out, int stride, const Real* a, bool transpose, int64_t lda, int row, int col, int rows,
          int cols) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j++)
      out[i * stride + j] = transpose ? a[(col + j) * lda + row + i] : a[(row + i) * lda + col + j];
}

// C = alpha op(A) op(B) + beta C. Each element is summed in the same order whatever the number of threads.
template <class Real>
void gemm(bool ta, bool tb, int m, int n, int k, Real alpha, const Real* a, int64_t lda, const Real* b,
          int64_t ldb, Real beta, Real* c, int64_t ldc) {
  const int row_blocks = (m + kRows - 1) / kRows, col_blocks = (n + kCols - 1) / kCols;
#pragma omp parallel
  {
    std::vector<Real> a_block(kRows * kDepth), b_block(kDepth * kCols), sum(kRows * kCols);
#pragma omp for collapse(2) schedule(static)
    for (int cb = 0; cb < col_blocks; cb++)
      for (int rb = 0; rb < row_blocks; rb++) {
        const int row = rb * kRows, col = cb * kCols;
        const int rows = std::min(kRows, m - row), cols = std::min(kCols, n - col);
        std::fill(sum.begin(), sum.end(), Real(0));
        for (int l0 = 0; l0 < k; l0 += kDepth) {
          const int depth = std::min(kDepth, k - l0);
          pack(a_block.data(), kDepth, a, ta, lda, row, l0, rows, depth);
          pack(b_block.data(), kCols, b, tb, ldb, l0, col, depth, cols);
          for (int i = 0; i < rows; i++)
            for (int l = 0; l < depth; l++) {
              const Real x = a_block[i * kDepth + l];
              Real* to = &sum[i * kCols];
              const Real* from = &b_block[l * kCols];
#pragma omp simd
              for (int j = 0; j < kCols; j++) to[j] += x * from[j];
            }
        }
        for (int i = 0; i < rows; i++)
          for (int j = 0; j < cols; j++) {
            Real& out = c[(row + i) * ldc + col + j];
            out = alpha * sum[i * kCols + j] + (beta == 0 ? Real(0) : beta * out);
          }
      }
  }
}

}  // namespace blocked

// C [m,n] = alpha op(A) [m,k] op(B) [k,n] + beta C, all row-major; beta = 0 never reads C.
template <class Real>
void cpu_gemm(bool ta, bool tb, int m, int n, int k, Real alpha, const Real* a, int64_t lda, const Real* b,
              int64_t ldb, Real beta, Real* c, int64_t ldc) {
#ifdef GDN_OPENBLAS
  const CBLAS_TRANSPOSE opa = ta ? CblasTrans : CblasNoTrans, opb = tb ? CblasTrans : CblasNoTrans;
  if constexpr (std::is_same<Real, float>::value)
    cblas_sgemm(CblasRowMajor, opa, opb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  else
    cblas_dgemm(CblasRowMajor, opa, opb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
#else
  blocked::gemm(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
#endif
}

}  // namespace gdn
