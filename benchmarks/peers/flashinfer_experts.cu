// FlashInfer's LoRA of experts as two C functions: bfloat16, one slice, a row of x per token. It
// compiles only the widths and the rank that its benchmark has, where FlashInfer compiles 24 widths
// of 4 ranks in several types.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

static cudaStream_t bgmv_moe_stream;  // of the launches; see fetch_flashinfer.sh

#include "moe_bgmv_config.h"
#include "moe_bgmv_impl.cuh"

#define SHAPES(f) f(2688, 32) f(3072, 32)

using T = nv_bfloat16;
using Ids = const int64_t*;
static const int NO_SHAPE = -1;

// v[pair] += A x[token]. Returns a cudaError, or -1 for a shape that is not compiled.
extern "C" int shrink(void* stream, int features, int rank, T* v, const T* x, T** a, Ids tokens,
                      Ids experts, Ids slots, int64_t pairs, int64_t all_experts,
                      int64_t all_tokens, int64_t slot_stride) {
  bgmv_moe_stream = static_cast<cudaStream_t>(stream);
#define SHRINK(H, R)                                                                        \
  if (features == H && rank == R) {                                                         \
    moe_bgmv_shrink_sliced<H, R, T, T, T, false>(v, x, a, tokens, experts, slots, pairs, 1, \
                                                 all_experts, all_tokens, slot_stride, 1);  \
    return cudaGetLastError();                                                              \
  }
  SHAPES(SHRINK)
  return NO_SHAPE;
}

// delta[token] += weight[pair] B v[pair], by atomic additions in float32. Returns as shrink does.
extern "C" int expand(void* stream, int features, int rank, float* delta, const T* v, T** b,
                      Ids tokens, Ids experts, Ids slots, const float* weights, Ids starts,
                      int64_t pairs, int64_t all_experts, int64_t all_tokens, int64_t slot_stride) {
  bgmv_moe_stream = static_cast<cudaStream_t>(stream);
#define EXPAND(N, R)                                                                      \
  if (features == N && rank == R) {                                                       \
    moe_bgmv_expand_sliced<R, N, T, T, true>(delta, v, b, tokens, experts, slots, weights, \
                                             starts, pairs, 1, all_experts, N, N,          \
                                             all_tokens, slot_stride, 1);                  \
    return cudaGetLastError();                                                            \
  }
  SHAPES(EXPAND)
  return NO_SHAPE;
}
