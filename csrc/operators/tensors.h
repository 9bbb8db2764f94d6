// What every operator's glue needs of torch: checks that speak in sentences, element types, work split over threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace megatron_retro {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// One sentence for the caller, without the place in our sources.
template <typename... Parts>
inline void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

inline Stored stored_type(const Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Stored::float32;
    case ScalarType::BFloat16: return Stored::bfloat16;
    case ScalarType::Half: return Stored::float16;
    case ScalarType::Double: return Stored::float64;
    default: require(false, what, " must be float32, bfloat16, float16 or float64");
  }
  return Stored::float32;
}

// Sums and statistics are kept in float32, or in float64 for float64 tensors.
inline ScalarType compute_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) text += (dim ? ", " : "") + std::to_string(tensor.size(dim));
  return text + "]";
}

// The dispatcher looks at one tensor of a call; another's memory may be elsewhere.
inline void check_device(const Tensor& tensor, const char* what, const Tensor& model, const char* model_name) {
  require(
      tensor.is_cpu() == model.is_cpu() && tensor.get_device_index() == model.get_device_index(), what,
      " must be on the device of ", model_name);
}

inline void check_like(const Tensor& tensor, const char* what, const Tensor& model, const char* model_name) {
  require(tensor.scalar_type() == model.scalar_type(), what, " must have the dtype of ", model_name);
  check_device(tensor, what, model, model_name);
}

inline void check_same_shape(const Tensor& tensor, const char* what, const Tensor& model, const char* model_name) {
  bool same = tensor.dim() == model.dim();
  for (int64_t dim = 0; same && dim < tensor.dim(); ++dim) same = tensor.size(dim) == model.size(dim);
  require(
      same, what, " must have the shape of ", model_name, ": got ", shape_of(tensor), ", expected ", shape_of(model));
}

inline void check_vector(const Tensor& tensor, const char* what, int64_t length) {
  require(
      tensor.numel() == length, what, " must have ", length, " elements, got the shape ", shape_of(tensor));
}

// What a forward pass kept for the backward pass, in the type that it computed in.
inline void check_statistic(const Tensor& tensor, const char* what, int64_t length, const Tensor& model, const char* model_name) {
  check_device(tensor, what, model, model_name);
  check_vector(tensor, what, length);
  require(
      tensor.scalar_type() == compute_type(model) && tensor.is_contiguous(), what, " must be contiguous ",
      compute_type(model) == ScalarType::Double ? "float64" : "float32");
}

inline const void* pointer(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// Sums over rows, one per thread, in two levels: kernels add to `block`, and after every few rows `flush` adds that to
// the thread's total, so that the rounding error grows with the square root of the number of rows at most.
class PartialSums {
 public:
  static constexpr int64_t rows_per_flush = 32;

  PartialSums(const Tensor& model, int64_t parts, int64_t width)
      : buffer(torch::stable::new_zeros(model, {2 * parts, width}, compute_type(model))),
        data(static_cast<char*>(buffer.mutable_data_ptr())),
        width(width),
        is_double(compute_type(model) == ScalarType::Double) {}

  void* block(int64_t part) const { return at(2 * part); }

  void flush(int64_t part) const {
    is_double ? add(static_cast<double*>(at(2 * part + 1)), static_cast<double*>(at(2 * part)))
              : add(static_cast<float*>(at(2 * part + 1)), static_cast<float*>(at(2 * part)));
  }

  // The sums over all parts, in the dtype of `model`.
  Tensor total(const Tensor& model) const {
    const std::vector<int64_t> over{0};
    return torch::stable::to(torch::stable::sum(buffer, over), model.scalar_type());
  }

 private:
  void* at(int64_t row) const { return data + row * width * (is_double ? 8 : 4); }

  template <typename Scalar>
  void add(Scalar* total, Scalar* block) const {
    for (int64_t column = 0; column < width; ++column) total[column] += block[column], block[column] = 0;
  }

  Tensor buffer;  // [parts, block and total, width]
  char* data;
  int64_t width;
  bool is_double;
};

// Sums of the columns over all rows, in the dtype of `model`.
inline Tensor sum_over_rows(const Tensor& rows, const Tensor& model) {
  const std::vector<int64_t> over{0};
  return torch::stable::to(torch::stable::sum(rows, over, false, compute_type(model)), model.scalar_type());
}

// Splits rows evenly over `parts` of torch's threads: visit(part, first, last).
template <typename Visitor>
inline void for_parts(int64_t rows, int64_t parts, const Visitor& visit) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) visit(part, rows * part / parts, rows * (part + 1) / parts);
  });
}

inline int64_t num_parts(int64_t rows, int64_t grain) {
  const int64_t most = torch::stable::get_num_threads();
  const int64_t useful = rows / (grain > 0 ? grain : 1);
  return useful < 1 ? 1 : useful < most ? useful : most;
}

// Rows that make a thread worth starting, when a row has `width` elements.
inline int64_t grain_of(int64_t width) { return 1 + 16384 / (width > 0 ? width : 1); }

}  // namespace megatron_retro
