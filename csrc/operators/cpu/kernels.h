// What the CPU kernels are called with. Tensors come as plain pointers; each call does rows first..last of its work.
//
// Gradients of weights and biases are sums over rows: every caller thread hands in a float buffer of its own
// (`partial_*`), and the caller adds them up in a fixed order.
#pragma once

#include <cstdint>

namespace megatron_retro {

enum class Stored : int { float32, bfloat16, float16, float64 };

enum class ActivationKind : int { silu, gelu, gelu_tanh, squared_relu };

struct Activation {
  ActivationKind kind;
  bool gated;           // input rows hold [gate, up]; otherwise `up` is absent
  int64_t width;        // of the output
  int64_t input_stride; // elements from one input row to the next
  const void* input;
  const void* bias;     // like one input row, or null
  void* output;
  const void* grad_output;
  void* grad_input;
  void* partial_grad_bias;  // compute type, one input row, or null
};

struct Norm {
  bool centered;         // LayerNorm; RMSNorm otherwise
  double epsilon;
  double weight_offset;  // 1 where the weight is stored as 1 + w
  int64_t width;
  const void* input;
  const void* residual;  // added to the input, or null
  const void* weight;    // compute type
  const void* bias;      // compute type, or null
  void* output;
  void* sum;             // input + residual, or null
  void* mean;            // compute type, one per row
  void* inverse_deviation;
  const void* grad_output;
  const void* grad_sum;  // what flows back past the norm, or null
  void* grad_input;
  void* partial_grad_weight;  // compute type
  void* partial_grad_bias;    // compute type, or null
};

struct Rotary {
  bool interleaved;
  bool inverse;        // rotate back: the gradient
  int64_t positions;   // a row is one position of one sequence: row = sequence * positions + position
  int64_t heads, width, rotated;
  int64_t input_strides[3], output_strides[3];  // sequence, position, head
  int64_t table_stride;  // from one sequence's table to the next, 0 for a shared one
  const void* input;
  const float* cosine;
  const float* sine;
  void* output;
};

// The softmax over one block of the vocabulary, column first_label being label `first_label`.
struct VocabularyBlock {
  int64_t width, stride, first_label;
  const int64_t* labels;
  void* logits;
  float* largest;              // statistics of each row: max, sum of exp(logit - max), the label's logit
  float* sum;
  float* label_logit;          // written only where the label is in this block
  const float* log_normalizer;
  const float* scale;          // d loss / d logit = scale * (p - [is label])
};

// Chunked cross-attention. A row is one (sequence, chunk, key/value head) in that order: what its queries read of keys
// and values belongs to no other row, so gradients need no atomics.
struct CrossAttention {
  int64_t queries, heads, groups, width, chunks, keys, chunk_length, first_position;
  int64_t query_strides[3];  // sequence, position, head
  int64_t key_strides[4];    // sequence, chunk, key, head
  int64_t value_strides[4];
  double scale;
  const void* query;
  const void* key;
  const void* value;
  const uint8_t* mask;       // [sequence, chunk, key], true = seen, or null
  int64_t rotated;           // dimensions that rotate: 0 = none
  bool interleaved;
  const float* query_cosine;  // [queries, rotated / 2]
  const float* query_sine;
  const float* key_cosine;    // [keys, rotated / 2]
  const float* key_sine;
  void* output;               // contiguous, like query
  void* log_normalizer;       // compute type, [sequence, head, query]
  const void* grad_output;    // contiguous
  void* grad_query;           // contiguous; so are the two below
  void* grad_key;
  void* grad_value;
};

// A product of a matrix with the few vectors of a decoding step. A row of the work is one output, of all rows of the input.
struct SmallBatchGemv {
  int64_t rows, depth, outputs;
  const void* input;   // [rows, depth], compute type
  const void* weight;  // [outputs, depth]
  const void* bias;    // [outputs], or null
  void* output;        // [rows, outputs]
};

// name, arguments
#define MEGATRON_RETRO_KERNELS(KERNEL)         \
  KERNEL(activation_forward, Activation)       \
  KERNEL(activation_backward, Activation)      \
  KERNEL(norm_forward, Norm)                   \
  KERNEL(norm_backward, Norm)                  \
  KERNEL(rotary, Rotary)                       \
  KERNEL(vocabulary_statistics, VocabularyBlock) \
  KERNEL(vocabulary_gradient, VocabularyBlock) \
  KERNEL(cross_attention_forward, CrossAttention) \
  KERNEL(cross_attention_backward, CrossAttention) \
  KERNEL(small_batch_gemv, SmallBatchGemv)

#define MEGATRON_RETRO_DECLARE(name, Arguments) void name(Stored stored, const Arguments& call, int64_t first, int64_t last);
#define MEGATRON_RETRO_DECLARE_ALL(set) \
  namespace set {                       \
  MEGATRON_RETRO_KERNELS(MEGATRON_RETRO_DECLARE) \
  }
MEGATRON_RETRO_DECLARE_ALL(generic)
#if defined(__x86_64__)
MEGATRON_RETRO_DECLARE_ALL(avx2)
MEGATRON_RETRO_DECLARE_ALL(avx512)
#endif

}  // namespace megatron_retro
