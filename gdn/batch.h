// A batch as the device gets it: tokens and targets, and what the layers read beside them, packed on the
// host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace gdn {

constexpr int kNoSeparator = -1;  // documents are not masked

// Rows in ascending order of their token, ties in ascending order of row: what embedding_backward walks.
inline void sort_rows_by_token(int32_t* order, const int32_t* tokens, int rows, int vocab) {
  std::vector<int32_t> start(size_t(vocab) + 1);
  for (int m = 0; m < rows; m++) start[size_t(tokens[m]) + 1]++;
  std::partial_sum(start.begin(), start.end(), start.begin());
  for (int m = 0; m < rows; m++) order[start[size_t(tokens[m])]++] = m;
}

// Each row's steps since its document began, with a token `separator`, or else its sequence. tokens [B,T].
inline void document_positions(int32_t* position, const int32_t* tokens, int batch, int length,
                               int separator) {
  for (int m = 0; m < batch * length; m++)
    position[m] = m % length == 0 || tokens[m] == separator ? 0 : position[m - 1] + 1;
}

// A batch as the device gets it, in one piece: `packed` [4,B*T] = tokens, targets, the rows sorted by token,
// and document_positions.
constexpr int kPackedRows = 4;
inline void pack_batch(int32_t* packed, const int32_t* tokens, const int32_t* targets, int batch, int length,
                       int vocab, int separator) {
  const int rows = batch * length;
  std::copy_n(tokens, rows, packed);
  std::copy_n(targets, rows, packed + rows);
  sort_rows_by_token(packed + 2 * size_t(rows), tokens, rows, vocab);
  document_positions(packed + 3 * size_t(rows), tokens, batch, length, separator);
}

}  // namespace gdn
