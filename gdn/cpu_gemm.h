// Row-major matrix products on the CPU: OpenBLAS where the Makefile found it (GDN_OPENBLAS), else blocked
// loops.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>
#ifdef GDN_OPENBLAS
#include <cblas.h>
#endif

namespace gdn {

namespace blocked {

constexpr int kTileRows = 8, kTileCols = 32;          // what is summed in registers
constexpr int kRows = 64, kCols = 256, kDepth = 128;  // a block of C and of the inner dimension

// Copies block [rows, cols] at (row, col) of op(A) into `out` with row stride `stride`.
template <class Real>
void pack(Real* out, int stride, const Real* a, bool transpose, int64_t lda, int row, int col, int rows,
          int cols) {
  if (transpose)
    for (int j = 0; j < cols; j++)
      for (int i = 0; i < rows; i++) out[i * stride + j] = a[(col + j) * lda + row + i];
  else
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < cols; j++) out[i * stride + j] = a[(row + i) * lda + col + j];
}

// sum [kTileRows,kTileCols] += a [kTileRows,depth] b [depth,kTileCols], in registers
template <class Real>
void add_tile(Real* sum, const Real* a, const Real* b, int depth) {
  Real tile[kTileRows][kTileCols];
  for (int i = 0; i < kTileRows; i++)
    for (int j = 0; j < kTileCols; j++) tile[i][j] = sum[i * kCols + j];
  for (int l = 0; l < depth; l++)
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; i++)
#pragma omp simd simdlen(16)
      for (int j = 0; j < kTileCols; j++) tile[i][j] += a[i * kDepth + l] * b[l * kCols + j];
  for (int i = 0; i < kTileRows; i++)
    for (int j = 0; j < kTileCols; j++) sum[i * kCols + j] = tile[i][j];
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
          for (int i = 0; i < rows; i += kTileRows)
            for (int j = 0; j < cols; j += kTileCols)
              add_tile(&sum[i * kCols + j], &a_block[i * kDepth], &b_block[j], depth);
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

#ifdef GDN_OPENBLAS
inline void blas_gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int m, int n, int k, float alpha,
                      const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c,
                      int64_t ldc) {
  cblas_sgemm(CblasRowMajor, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
inline void blas_gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int m, int n, int k, double alpha,
                      const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c,
                      int64_t ldc) {
  cblas_dgemm(CblasRowMajor, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

// OpenBLAS's own threads and OpenMP's wait for each other busily on the same cores (58 instead of 180 GFLOP/s
// on two cores), so the longer side of C is cut into pieces that OpenMP's threads hand to a single-threaded
// OpenBLAS. The pieces depend on the sizes alone: the same bits with any number of threads.
template <class Real>
void piecewise_blas_gemm(bool ta, bool tb, int m, int n, int k, Real alpha, const Real* a, int64_t lda,
                         const Real* b, int64_t ldb, Real beta, Real* c, int64_t ldc) {
  static const bool single_threaded = (openblas_set_num_threads(1), true);
  (void)single_threaded;
  const CBLAS_TRANSPOSE opa = ta ? CblasTrans : CblasNoTrans, opb = tb ? CblasTrans : CblasNoTrans;
  const bool by_rows = m >= n;
  const int size = by_rows ? m : n, piece = std::min(256, std::max(64, size / 8 / 64 * 64));
#pragma omp parallel for schedule(static)
  for (int first = 0; first < size; first += piece) {
    const int count = std::min(piece, size - first);
    if (by_rows)
      blas_gemm(opa, opb, count, n, k, alpha, a + (ta ? first : first * lda), lda, b, ldb, beta,
                c + first * ldc, ldc);
    else
      blas_gemm(opa, opb, m, count, k, alpha, a, lda, b + (tb ? first * ldb : first), ldb, beta, c + first,
                ldc);
  }
}
#endif

// C [m,n] = alpha op(A) [m,k] op(B) [k,n] + beta C, all row-major; beta = 0 never reads C.
template <class Real>
void cpu_gemm(bool ta, bool tb, int m, int n, int k, Real alpha, const Real* a, int64_t lda, const Real* b,
              int64_t ldb, Real beta, Real* c, int64_t ldc) {
#ifdef GDN_OPENBLAS
  piecewise_blas_gemm(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
#else
  blocked::gemm(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
#endif
}

}  // namespace gdn
