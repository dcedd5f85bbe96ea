// What an operation of this library checks its arguments with: ValueErrors that name the argument.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace {

template <typename Work>
void for_dtype(const at::Tensor& tensor, const Work& work) {
  if (tensor.scalar_type() == at::kFloat) {
    work(float{});
  } else {
    work(c10::BFloat16{});
  }
}

// Messages are put together without streams: those of this library and of torch's may be of different make.
inline std::string text(at::ScalarType type) { return at::toString(type); }

inline std::string text(at::IntArrayRef numbers) {
  std::string joined = "[";
  for (const int64_t number : numbers) joined += (joined.size() > 1 ? ", " : "") + std::to_string(number);
  return joined + "]";
}

inline std::string described(const at::Tensor& tensor) {
  return text(tensor.scalar_type()) + " " + text(tensor.sizes()) + " with strides " + text(tensor.strides()) +
         (tensor.is_cpu() ? "" : ", not on the CPU");
}

// A contiguous CPU tensor of `dims` dimensions, the last of `last` numbers, of a dtype that we compute with.
inline void check(const std::string& name, const at::Tensor& tensor, int64_t dims, int64_t last) {
  TORCH_CHECK_VALUE(tensor.dim() == dims && tensor.size(-1) == last && tensor.is_contiguous() && tensor.is_cpu() &&
                        (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16),
                    name + ": wanted a contiguous CPU tensor of " + std::to_string(dims) + " dimensions, the last " +
                        std::to_string(last) + ", float32 or bfloat16, not " + described(tensor));
}

inline void check_like(const std::string& name, const at::Tensor& tensor, const std::string& other_name,
                const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == other.scalar_type(), name + " is " + text(tensor.scalar_type()) + " and " +
                                                                     other_name + " " + text(other.scalar_type()) +
                                                                     ": wanted the same");
}

inline void check_indices(const std::string& name, const at::Tensor& tensor, at::ScalarType type, int64_t length) {
  TORCH_CHECK_VALUE(
      tensor.dim() == 1 && tensor.size(0) == length && tensor.scalar_type() == type && tensor.is_cpu() &&
          tensor.is_contiguous(),
      name + ": wanted contiguous " + text(type) + " [" + std::to_string(length) + "], not " + described(tensor));
}

// [NB, BS, Hkv, D], stored heads first -> [NB, Hkv, BS, D], as it lies in memory.
inline at::Tensor stored(const std::string& name, const at::Tensor& cache) {
  TORCH_CHECK_VALUE(cache.dim() == 4, name + ": wanted [NB, BS, Hkv, D], not " + described(cache));
  at::Tensor as_it_lies = cache.transpose(1, 2);
  check(name, as_it_lies, 4, cache.size(3));
  return as_it_lies;
}

}  // namespace
