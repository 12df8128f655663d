// The face of the GPU layers: what gdn/cpu_layers.h has for the CPU, under the same names with the same
// arguments. The equations are written there; here stand shapes and types, and in gdn/kernels/*.cuh each
// kernel with its lower bound and its measured time. The gated delta rule's equations: dev/doc/delta_rule.md.
//
// Conventions
//   act (bf16): activations, their gradients, the weights of Linear and embedding. float: everything else.
//   Arithmetic is fp32. Arrays lie in GPU memory, begin on 16 bytes, and are row-major and dense.
//   Activation gradients are overwritten unless the comment says "+="; gradients of parameters are always
//   added to. `scratch` is work space of as many bytes as NAME_scratch_bytes says, free again when the layer
//   has run. Widths d, inner, padded vocabularies and out, in of a Linear are multiples of 8; dk and dv
//   multiples of 16, dk <= 256, dv <= 512. Others throw one line. Every result is the same bits from run to
//   run: sums that cross blocks go through scratch in a fixed order.
//   To a profiler each layer is an NVTX range of its own name.
//   Floors are the bytes a layer must move, each input read and each output written once. Times and percents in
//   gdn/kernels/*.cuh are of an NVIDIA H100 and of its own measured copy rate, 3.005 TB/s, read + write, of a
//   device-to-device copy (dev/bench_layers.cu; dev/results/layer_speed), unless the comment names another
//   card and record. A layer's time includes its second stage.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gdn/cuda_device.cuh"
#include "gdn/shapes.h"

namespace gdn {

// ---- embedding --------------------------------------------------------------------------------------------

// x [M,d] = rows `tokens` [M] of w_emb [V,d]
void embedding_forward(Cuda&, act* x, const act* w_emb, const int32_t* tokens, int rows, int width);

// dw_emb [V,d] float += rows of dx [M,d] act at their tokens; `order` [M] lists the rows sorted by token,
// ties in ascending order.
void embedding_backward(Cuda&, float* dw_emb, const act* dx, const int32_t* tokens, const int32_t* order,
                        int rows, int width, void* scratch);
size_t embedding_backward_scratch_bytes(Cuda&, int rows, int width);

// ---- RMSNorm ----------------------------------------------------------------------------------------------

// h [M,d] act = w * x * rstd,  rstd [M] float = 1 / sqrt(mean(x^2) + eps),  w [d] float; d <= 8192
void rmsnorm_forward(Cuda&, act* h, float* rstd, const act* x, const float* w, int rows, int width);

// x_out [M,d] = x + branch, then h and rstd as rmsnorm_forward of the rounded x_out. x_out may be x or
// branch.
void residual_rmsnorm_forward(Cuda&, act* x_out, act* h, float* rstd, const act* x, const act* branch,
                              const float* w, int rows, int width);

// dx [M,d] act += gradient through the norm, dw [d] float += sum over rows; h [M,d] act (nullptr: not wanted)
// = what the forward gave, to the bit, for the weight gradient of the Linear that read it. h may be dh.
void rmsnorm_backward(Cuda&, act* dx, float* dw, act* h, const act* dh, const act* x, const float* rstd,
                      const float* w, int rows, int width, void* scratch);
size_t rmsnorm_backward_scratch_bytes(Cuda&, int rows, int width);

// ---- Linear -----------------------------------------------------------------------------------------------

// y [M,out] act = scale * x [M,in] w^T,  w [out,in] act
void linear_forward(Cuda&, act* y, const act* x, const act* w, int rows, int out, int in, float scale = 1);

// dx [M,in] act = scale * dy [M,out] w
void linear_backward_input(Cuda&, act* dx, const act* dy, const act* w, int rows, int out, int in,
                           float scale = 1);

// dw [out,in] float += scale * dy^T x
void linear_backward_weight(Cuda&, float* dw, const act* dy, const act* x, int rows, int out, int in,
                            float scale = 1);

// ---- short convolution, silu, L2 norm of q and k; gates ---------------------------------------------------

// qkv [M,C] act from the first C = conv_channels columns of proj [M,P] act; rnorm [M,2 Hk] float; g, beta
// [M,Hv] float from the a and b columns of proj; taps [C,4], A_log, dt_bias [Hv] float; history [B,3,C] act:
// inputs before t = 0 and, on return, the last three inputs (nullptr: zeros, nothing kept). position [M]: steps
// since the row's document began; the convolution sees nothing before it, and its first token has g =
// kDocumentDecay (nullptr: one document).
void short_conv_gates_forward(Cuda&, act* qkv, float* rnorm, float* g, float* beta, const act* proj,
                              const float* taps, const float* A_log, const float* dt_bias, act* history,
                              const MixerShape&, float beta_max, const int32_t* position = nullptr);

// Every column of dproj [M,P] act but those of z; dtaps [C,4], dA_log, ddt_bias [Hv] float +=. dqkv [M,C] act
// is work space: do not read it afterwards. dg, dbeta [M,Hv] float.
void short_conv_gates_backward(Cuda&, act* dproj, float* dtaps, float* dA_log, float* ddt_bias, act* dqkv,
                               const float* dg, const float* dbeta, const float* rnorm, const float* g,
                               const float* beta, const act* proj, const float* taps, const float* A_log,
                               const float* dt_bias, const MixerShape&, float beta_max, void* scratch,
                               const int32_t* position = nullptr);
size_t short_conv_gates_backward_scratch_bytes(Cuda&, const MixerShape&);

// ---- gated delta rule -------------------------------------------------------------------------------------

// o [M,Hv*dv] act from qkv [M,C] act and g, beta [M,Hv] float; s scales the readout. What the backward pass
// needs is left in `saved` [gated_delta_rule_saved_bytes].
void gated_delta_rule_forward(Cuda&, act* o, void* saved, const act* qkv, const float* g, const float* beta,
                              const MixerShape&, float s, void* scratch);
size_t gated_delta_rule_saved_bytes(Cuda&, const MixerShape&);
size_t gated_delta_rule_scratch_bytes(Cuda&, const MixerShape&);

// dqkv [M,C] act, dg, dbeta [M,Hv] float from d_o [M,Hv*dv] act
void gated_delta_rule_backward(Cuda&, act* dqkv, float* dg, float* dbeta, const act* d_o, const void* saved,
                               const act* qkv, const float* g, const float* beta, const MixerShape&, float s,
                               void* scratch);

// The same o token by token; state [B,Hv,dk,dv] float is read and updated, so that a sequence can be fed in
// pieces.
void gated_delta_rule_recurrent(Cuda&, act* o, float* state, const act* qkv, const float* g,
                                const float* beta, const MixerShape&, float s);

// ---- output norm and gate ---------------------------------------------------------------------------------

// y [M,Hv*dv] act = w_o * o * rstd * silu(z); rstd [M,Hv] float, o [M,Hv*dv] act, w_o [dv] float, z columns
// of proj
void output_norm_forward(Cuda&, act* y, float* rstd, const act* o, const act* proj, const float* w_o,
                         const MixerShape&);

// d_o [M,Hv*dv] act, the z columns of dproj [M,P] act, dw_o [dv] float +=; y [M,Hv*dv] act = what the forward
// gave, to the bit, for the weight gradient of the Linear that read it. d_o may be dy.
void output_norm_backward(Cuda&, act* d_o, act* dproj, float* dw_o, act* y, const act* dy, const act* o,
                          const float* rstd, const act* proj, const float* w_o, const MixerShape&,
                          void* scratch);
size_t output_norm_backward_scratch_bytes(Cuda&, const MixerShape&);

// ---- SwiGLU -----------------------------------------------------------------------------------------------

// out [M,I] act = silu(gate) * up, gate_up [M,2I] act
void swiglu_forward(Cuda&, act* out, const act* gate_up, int rows, int inner);

// dgate_up [M,2I] act from dout [M,I] act; out [M,I] act = what the forward gave, to the bit, for the weight
// gradient of the Linear that read it. out may be dout.
void swiglu_backward(Cuda&, act* dgate_up, act* out, const act* dout, const act* gate_up, int rows,
                     int inner);

// ---- classifier -------------------------------------------------------------------------------------------

// losses [n] float in nats; logits [n,padded] act become their gradient times dlogits_scale unless that is 0;
// targets [n], < 0: ignored.
void softmax_cross_entropy(Cuda&, act* logits, float* losses, const int32_t* targets, int rows, int vocab,
                           int padded, float dlogits_scale);

// *total (GPU memory) += sum of losses [n]
void sum_losses(Cuda&, double* total, const float* losses, int rows);

// ---- optimizer --------------------------------------------------------------------------------------------

// sum [n] += x [n] and *loss_sum += *loss (GPU memory): two partial sums over micro-batches become one. n is a
// multiple of 4.
void add_gradients(Cuda&, float* sum, const float* x, size_t n, double* loss_sum, const double* loss);

// *nanoseconds (GPU memory) = the GPU's clock when the stream comes here.
void time_stamp(Cuda&, int64_t* nanoseconds);

// sum: of `pieces` pieces of `piece` numbers, each `stride` numbers behind the last; x has as many, one behind the
// other, and is added. piece and stride are multiples of 4.
void add_pieces(Cuda&, float* sum, const float* x, int pieces, size_t piece, size_t stride);

// *sum = the sum of x [n] (GPU memory), n a power of two up to 1024, in the order of a binary tree.
void sum_tree(Cuda&, double* sum, const double* x, int n);

// sums[k] (GPU memory) = sum over `spans` [count] of norm_weight * sum of squares of their gradients in block k of
// the arena (kArenaBlock numbers each), for the blocks of `range`. gradients is the arena, the spans lie in GPU
// memory as for the updates below.
void sum_of_squares(Cuda&, double* sums, const float* gradients, const ArenaRange& range,
                    const ParameterSpan* spans, int count);

// *norm (GPU memory) = sqrt(sum of the blocks' sums), through the groups [count] of the arena (GPU memory): zeros at
// their ends change nothing.
void norm_of_sums(Cuda&, float* norm, const double* sums, const ArenaRange* groups, int count);

// *norm = NaN where *loss is not finite (both in GPU memory): the update then changes nothing.
void check_loss(Cuda&, float* norm, const double* loss);

// master, moments, gradients: float arenas; weights: act arena, rounded to nearest even. Of the arenas the numbers of
// `range` are done, where all of these arrays begin. `spans` [count] lies in GPU memory like the arenas, ascending in
// offset and disjoint, each offset a multiple of 8. *norm and *step in GPU memory; nothing changes when the norm is
// not finite.
void adamw_update(Cuda&, float* master, act* weights, float* moment1, float* moment2, const float* gradients,
                  const ArenaRange& range, const ParameterSpan* spans, int count, const float* norm,
                  const AdamwStep*);
void sgd_update(Cuda&, float* master, act* weights, float* moment, const float* gradients,
                const ArenaRange& range, const ParameterSpan* spans, int count, const float* norm,
                const SgdStep*);

// weights [n] act = master [n] float, rounded to nearest even
void round_weights(Cuda&, act* weights, const float* master, size_t n);

// ---- initial values ---------------------------------------------------------------------------------------

// x [n] float = standard_deviation * the normals 0 to n - 1 of the stream `key` (gdn/random.h), with the
// CPU's bits
void random_normals(Cuda&, float* x, size_t n, uint64_t key, double standard_deviation);

}  // namespace gdn
