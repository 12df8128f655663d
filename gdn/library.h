/* The layers of train_gdn as C functions: libgdn.so (`make libgdn.so`). scripts/gdn_torch.py calls it from PyTorch;
 * dev/doc/library.md has examples.
 *
 * Every function takes a struct, returns 0, or -1 and leaves one line in gdn_last_error() of the calling thread. None
 * exits, throws or keeps anything between calls, so that any number of threads may call at once. The struct's first
 * member is its size: gdn_delta_rule x = {sizeof x}; the members that follow are then zero, and what is zero is not
 * wanted.
 *
 * Tensors are read and written where they lie: `data` with the strides of its dimensions in elements. All tensors of a
 * call are of the call's type. The CPU computes float32 and float64, with any strides.
 *
 * Built with nvcc, the GPU computes the delta rule, in bfloat16: q, k, v, o and their gradients are bfloat16, g, beta,
 * states and their gradients float32. There head_dim_k and head_dim_v are multiples of 16, to 256 and to 512; the strides of
 * q, k, v, o, their gradients and d_o over tokens and heads, and their beginnings, multiples of 8 elements; that over the
 * batch T times that over tokens; g, beta and their gradients dense; states as the comments below say. `normalized` must be
 * 0. Calls are queued on `stream` and return at once; of several documents each runs as a call of its own, in order.
 */
#ifndef GDN_LIBRARY_H
#define GDN_LIBRARY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { GDN_ON_CPU = 0, GDN_ON_CUDA = 1 } gdn_device;
typedef enum { GDN_FLOAT32 = 0, GDN_FLOAT64 = 1, GDN_BFLOAT16 = 2, GDN_FLOAT16 = 3 } gdn_type;

typedef struct {
  void* data; /* null: there is none */
  int64_t stride[4];
} gdn_tensor;

/* The gated delta rule. Per head, S [dk,dv] from initial_state (null: zeros), token by token:
 *   S~_t = e^{g_t} S_{t-1}    u_t = beta_t (v_t - S~_t^T k_t)    S_t = S~_t + k_t u_t^T    o_t = scale S_t^T q_t
 * q, k [B,T,Hk,dk]; v, o [B,T,Hv,dv]; g, beta [B,T,Hv]; states [N,Hv,dk,dv]; Hv is a multiple of Hk, and value heads
 * h * Hv/Hk to (h + 1) * Hv/Hk - 1 share the q and k of key head h. N = B, or, with cu_seqlens, B = 1 and N documents:
 * document n is the tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1 and has a state of its own.
 * Gradients are overwritten. */
typedef struct {
  size_t size; /* sizeof(gdn_delta_rule) */
  int32_t device, type;
  int32_t device_number; /* of the GPU */
  void* stream;          /* cudaStream_t; null: the default stream */
  int64_t batch, tokens;
  int32_t heads_k, heads_v, head_dim_k, head_dim_v;
  int64_t sequences;         /* N */
  const int64_t* cu_seqlens; /* [N+1] on the host, from 0 to T, ascending; null: none */
  double scale;
  int32_t normalized; /* q and k are divided by sqrt(|.|^2 + 1e-6) first */
  /* States on the GPU are dense as [N,Hv,dv,dk], the strides telling so; in gdn_delta_rule_recurrent dense as
   * [N,Hv,dk,dv]. */
  gdn_tensor q, k, v, g, beta, initial_state;
  gdn_tensor o, final_state;                         /* written by the forward; final_state may be null */
  gdn_tensor d_o, d_final_state;                     /* read by the backward; d_final_state may be null */
  gdn_tensor dq, dk, dv, dg, dbeta, d_initial_state; /* written by it; d_initial_state may be null */
  void* saved;   /* from forward to backward; null in a forward that no backward follows */
  void* scratch; /* work space of a call on the GPU */
} gdn_delta_rule;

/* Bytes of `saved` and `scratch`, from the sizes alone. */
int gdn_delta_rule_bytes(const gdn_delta_rule*, size_t* saved, size_t* scratch);
/* In chunks of 64 tokens. */
int gdn_delta_rule_forward(const gdn_delta_rule*);
int gdn_delta_rule_backward(const gdn_delta_rule*);
/* The forward token by token, for decoding; final_state may be initial_state. */
int gdn_delta_rule_recurrent(const gdn_delta_rule*);

/* Depthwise causal convolution of 4 taps, then silu, on x, y [B,T,C]:
 *   u_t = sum_{j=0..3} taps[.,j] x_{t-3+j}    y = silu(u)
 * taps [C,4] dense. Documents as above: nothing is seen of the one before. initial_state, final_state [N,3,C]: the
 * inputs before a document's first token (null: zeros), and the last three of what came in. The backward is of calls
 * without initial_state. The last dimension's stride of x, y, dx and dy is 1. */
typedef struct {
  size_t size; /* sizeof(gdn_short_conv) */
  int32_t device, type;
  void* stream;
  int64_t batch, tokens, channels;
  int64_t sequences;
  const int64_t* cu_seqlens;
  const void* taps;
  gdn_tensor x, initial_state;
  gdn_tensor y, final_state;
  gdn_tensor dy;
  gdn_tensor dx;
  void* dtaps; /* [C,4], overwritten */
} gdn_short_conv;

int gdn_short_conv_forward(const gdn_short_conv*);
int gdn_short_conv_backward(const gdn_short_conv*);

/* Gated RMSNorm of R rows of n numbers: y = weight x / sqrt(mean(x^2) + eps) silu(z). x, z, y [R,n], the last
 * dimension's stride 1; weight [n]. */
typedef struct {
  size_t size; /* sizeof(gdn_gated_norm) */
  int32_t device, type;
  void* stream;
  int64_t rows;
  int32_t width; /* n */
  double eps;
  const void* weight;
  gdn_tensor x, z;
  gdn_tensor y;
  gdn_tensor dy;
  gdn_tensor dx, dz;
  void* dweight; /* [n], overwritten */
} gdn_gated_norm;

int gdn_gated_norm_forward(const gdn_gated_norm*);
int gdn_gated_norm_backward(const gdn_gated_norm*);

/* The whole mixer, h [B,T,d] to y [B,T,d], everything dense:
 *   q~, k~, v~, z, a, b = W h for W of w_q, w_k [Hk*dk,d], w_v, w_z [Hv*dv,d], w_a, w_b [Hv,d]
 *   q, k, v = silu(conv(q~ | k~ | v~)), taps [2 Hk*dk + Hv*dv,4];   q, k divided by sqrt(|.|^2 + 1e-6) per head
 *   g = -exp(A_log) softplus(a + dt_bias)    beta = beta_max sigmoid(b)    A_log, dt_bias [Hv]
 *   o = gated delta rule                     y = w_o (w_norm o / sqrt(mean(o^2) + norm_eps) silu(z))
 * with w_norm [dv], w_o [d,Hv*dv]. The backward computes the forward again, and y too where it is not null; gradients
 * are overwritten, those that are null left out. */
typedef struct {
  size_t size; /* sizeof(gdn_mixer) */
  int32_t device, type;
  void* stream;
  int64_t batch, tokens;
  int32_t width, heads_k, heads_v, head_dim_k, head_dim_v;
  int64_t sequences;
  const int64_t* cu_seqlens;
  double scale, norm_eps, beta_max;
  const void *h, *w_q, *w_k, *w_v, *w_z, *w_a, *w_b, *taps, *A_log, *dt_bias, *w_norm, *w_o;
  void* y;
  const void* dy;
  void *dh, *dw_q, *dw_k, *dw_v, *dw_z, *dw_a, *dw_b, *dtaps, *dA_log, *ddt_bias, *dw_norm, *dw_o;
} gdn_mixer;

int gdn_mixer_forward(const gdn_mixer*);
int gdn_mixer_backward(const gdn_mixer*);

/* Why the calling thread's last call failed. */
const char* gdn_last_error(void);
/* Whether the library was built with CUDA. */
int gdn_has_cuda(void);

#ifdef __cplusplus
}
#endif
#endif
