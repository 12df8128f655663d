// Sizes that the layers share. B sequences of T tokens; M = B*T rows; d the width of the residual stream.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace gdn {

constexpr int kConvTaps = 4;  // length of the short convolution
// Tokens that the gated delta rule handles at a time. The CPU's layer and dev/readable take any number; the
// kernels of gdn/kernels/delta_rule are written for 64 (4 warps of 16 rows, tiles [64,64]).
constexpr int kChunk = 64;
constexpr double kNormEps = 1e-6;  // in every RMSNorm, and under the square root of the q/k L2 norm

// Where documents are masked, log decay g of a document's first token: the state before it goes on as
// e^-64 = 1.6e-28 of itself, which vanishes beside any number that float or double rounds, and the delta
// rule's running sums of g (float on the GPU) lose no more than 64 * 2^-24 = 4e-6 of their differences;
// infinity in its place would make those NaN, and a large number would round the decays after it away.
constexpr double kDocumentDecay = -64;

// Whether the convolution's input `distance` steps before row m is of m's document: position [M] counts the
// steps since the row's document (or sequence) began; nullptr: documents are not masked.
inline bool same_document(const int32_t* position, int64_t m, int distance) {
  return !position || distance <= position[m];
}

// Shape of one mixer call. Value heads share q and k in groups of heads_v / heads_k (grouped values).
//
// A row of the mixer's projections, proj [B,T,columns]:
//   q~ [Hk*dk] | k~ [Hk*dk] | v~ [Hv*dv] | z [Hv*dv] | a [Hv] | b [Hv] | zeros up to a multiple of 8
// and of the convolved and normalised qkv [B,T,conv_channels]:
//   q [Hk*dk] | k [Hk*dk] | v [Hv*dv]
struct MixerShape {
  int batch = 0, tokens = 0;           // B, T
  int heads_k = 0, heads_v = 0;        // Hk, Hv: Hv a multiple of Hk
  int head_dim_k = 0, head_dim_v = 0;  // dk, dv

  int rows() const { return batch * tokens; }
  int key_dim() const { return heads_k * head_dim_k; }
  int value_dim() const { return heads_v * head_dim_v; }
  int conv_channels() const { return 2 * key_dim() + value_dim(); }
  int z_column() const { return conv_channels(); }
  int a_column() const { return conv_channels() + value_dim(); }
  int b_column() const { return a_column() + heads_v; }
  int columns() const { return (b_column() + heads_v + 7) / 8 * 8; }
  int chunks() const { return (tokens + kChunk - 1) / kChunk; }
};

// One tensor as the optimizer sees it: `size` numbers at `offset` of the parameter arena.
struct ParameterSpan {
  size_t offset = 0, size = 0;
  float learning_rate_scale = 1;  // multiplies the step's learning rate (mup.h)
  float weight_decay = 0;         // this tensor's decay: -wd, or 0 where there is none
  float norm_weight = 1;          // of its gradient's squares in the norm that is clipped (mup.h)
  float epsilon_scale = 1;        // multiplies AdamW's eps (mup.h)
};

// The parameter arena in blocks of this many numbers: the squares of a gradient are summed block by block,
// and a rank's share of the arena is made of whole blocks, so that no sum depends on the number of ranks.
constexpr size_t kArenaBlock = 4096;

// Numbers [begin, end) of the arena, both multiples of kArenaBlock.
struct ArenaRange {
  size_t begin = 0, end = 0;
  size_t size() const { return end - begin; }
};

// The order in which a step's micro-batches are summed (training_step.h).
enum class GradientSum { tree, running };
inline const char* name(GradientSum sum) { return sum == GradientSum::tree ? "tree" : "running"; }

// What an update reads of its step. It lies in the device's memory, so that a recorded graph finds there what
// changes from step to step.
struct AdamwStep {
  float learning_rate = 0, beta1 = 0, beta2 = 0, epsilon = 1e-8f;
  float clip = 0;                           // gradients are scaled by min(1, clip / norm); 0: never
  double correction1 = 1, correction2 = 1;  // 1 - beta^t: the moments start at 0

  // The corrections of step t, which counts from 1.
  void set_step(int64_t t) {
    correction1 = 1 - std::pow(double(beta1), double(t));
    correction2 = 1 - std::pow(double(beta2), double(t));
  }
};

struct SgdStep {
  float learning_rate = 0, momentum = 0;  // Nesterov
  float clip = 0;
};

}  // namespace gdn
