// Stands for torch's headers: as much of at::Tensor as csrc/cpu asks for, so that the CPU operators are compiled as
// they are, for a processor that there is no torch for. Every header of torch's that they include becomes one that
// includes this (tests/kernels/emulated.py). Slow and plain; what changes values works on float32 alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "dfqvit/simd_convert.h"

namespace c10 {
using string_view = std::string_view;

constexpr int autocast_dispatch_keyset = 0;
namespace impl {
struct ExcludeDispatchKeyGuard {  // there is no autocast
  explicit ExcludeDispatchKeyGuard(int) {}
};
}  // namespace impl
}  // namespace c10

namespace at {

struct Half {
  uint16_t bits;
  Half() = default;
  Half(float value) : bits(dfqvit::simd::portable::to_half(value)) {}
  operator float() const { return dfqvit::simd::portable::from_half(bits); }
};

struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  BFloat16(float value) {
    uint32_t b;
    std::memcpy(&b, &value, sizeof(b));
    bits = static_cast<uint16_t>(value != value ? 0x7FC0u : (b + 0x7FFFu + (b >> 16 & 1u)) >> 16);
  }
  operator float() const { return dfqvit::simd::portable::bits_to_float(static_cast<uint32_t>(bits) << 16); }
};

// The order is that of `TYPES` in tests/kernels/emulated.py.
enum class ScalarType : int { Float, BFloat16, Half, Byte, Char, Int, Long, Double };
constexpr ScalarType kFloat = ScalarType::Float, kBFloat16 = ScalarType::BFloat16, kHalf = ScalarType::Half,
                     kByte = ScalarType::Byte, kChar = ScalarType::Char, kInt = ScalarType::Int,
                     kLong = ScalarType::Long, kDouble = ScalarType::Double;

inline int64_t size_of(ScalarType type) {
  constexpr int kSizes[] = {4, 2, 2, 1, 1, 4, 8, 8};
  return kSizes[static_cast<int>(type)];
}
inline std::ostream& operator<<(std::ostream& out, ScalarType type) {
  constexpr const char* kNames[] = {"Float", "BFloat16", "Half", "Byte", "Char", "Int", "Long", "Double"};
  return out << kNames[static_cast<int>(type)];
}

template <typename T>
class ArrayRef {
 public:
  ArrayRef() = default;
  ArrayRef(const std::vector<T>& values) : data_(values.data()), size_(values.size()) {}
  ArrayRef(const std::initializer_list<T>& values) : data_(std::data(values)), size_(values.size()) {}
  size_t size() const { return size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  const T& operator[](size_t i) const { return data_[i]; }
  std::vector<T> vec() const { return std::vector<T>(begin(), end()); }

 private:
  const T* data_ = nullptr;
  size_t size_ = 0;
};
using IntArrayRef = ArrayRef<int64_t>;

inline bool operator==(IntArrayRef a, IntArrayRef b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}
inline std::ostream& operator<<(std::ostream& out, IntArrayRef values) {
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "[") << values[i];
  return out << (values.size() ? "]" : "[]");
}

struct TensorOptions {
  ScalarType type;
  TensorOptions(ScalarType type) : type(type) {}
  TensorOptions dtype(ScalarType other) const { return other; }
};
enum class MemoryFormat { Contiguous };
struct Device {
  bool is_cpu() const { return true; }
};

class Tensor {
 public:
  Tensor() = default;
  Tensor(std::vector<int64_t> sizes, ScalarType type) : sizes_(std::move(sizes)), strides_(sizes_.size()), type_(type) {
    int64_t count = 1;
    for (size_t d = sizes_.size(); d-- > 0; count *= sizes_[d]) strides_[d] = count;
    // poisoned, at a multiple of 64 like torch's memory, and so that a read or write beyond the end meets nobody else's
    constexpr int64_t kMargin = 256;
    memory_ = std::shared_ptr<char>(
        static_cast<char*>(std::aligned_alloc(64, (count * at::size_of(type) + kMargin) / 64 * 64)), std::free);
    std::memset(memory_.get(), 0xAB, count * at::size_of(type));
  }

  bool defined() const { return memory_ != nullptr; }
  ScalarType scalar_type() const { return type_; }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  IntArrayRef sizes() const { return sizes_; }
  int64_t size(int64_t d) const { return sizes_[d < 0 ? d + dim() : d]; }
  int64_t stride(int64_t d) const { return strides_[d < 0 ? d + dim() : d]; }
  int64_t element_size() const { return at::size_of(type_); }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t size : sizes_) count *= size;
    return count;
  }
  size_t nbytes() const { return numel() * element_size(); }
  TensorOptions options() const { return type_; }
  void* mutable_data_ptr() const { return memory_.get() + offset_ * element_size(); }
  const void* const_data_ptr() const { return mutable_data_ptr(); }
  template <typename T>
  T* mutable_data_ptr() const {
    return static_cast<T*>(mutable_data_ptr());
  }
  template <typename T>
  const T* const_data_ptr() const {
    return static_cast<const T*>(mutable_data_ptr());
  }

  Device device() const { return {}; }
  bool is_conj() const { return false; }
  bool is_neg() const { return false; }
  bool is_contiguous() const {
    int64_t count = 1;
    bool whole = true;
    for (int64_t d = dim() - 1; d >= 0; count *= sizes_[d--]) whole &= strides_[d] == count || sizes_[d] == 1;
    return whole;
  }
  Tensor detach() const { return *this; }
  Tensor contiguous() const { return is_contiguous() ? *this : clone(MemoryFormat::Contiguous); }
  Tensor clone(MemoryFormat) const {
    Tensor result(sizes_, type_);
    char* to = static_cast<char*>(result.mutable_data_ptr());
    each([&](int64_t place, int64_t i) {
      std::memcpy(to + i * element_size(), memory_.get() + place * element_size(), element_size());
    });
    return result;
  }
  Tensor to(ScalarType type) const {
    if (type == type_) return *this;
    const Tensor from = contiguous();
    Tensor result(sizes_, type);
    for (int64_t i = 0; i < numel(); ++i) result.put(i, from.get(i));
    return result;
  }
  Tensor& zero_() {
    std::memset(mutable_data_ptr(), 0, nbytes());
    return *this;
  }

  // One size may be -1, what the others leave.
  Tensor reshape(std::vector<int64_t> sizes) const {
    int64_t known = 1;
    for (int64_t size : sizes) known *= size == -1 ? 1 : size;
    for (int64_t& size : sizes) size = size == -1 ? numel() / known : size;
    Tensor result = contiguous();
    result.sizes_ = result.strides_ = sizes;
    int64_t count = 1;
    for (size_t d = sizes.size(); d-- > 0; count *= sizes[d]) result.strides_[d] = count;
    return result;
  }
  Tensor t() const {
    Tensor result = *this;
    std::swap(result.sizes_[0], result.sizes_[1]);
    std::swap(result.strides_[0], result.strides_[1]);
    return result;
  }
  Tensor slice(int64_t d, int64_t begin) const { return slice(d, begin, sizes_[d]); }
  Tensor slice(int64_t d, int64_t begin, int64_t end) const {
    Tensor result = *this;
    result.sizes_[d] = end - begin;
    result.offset_ += begin * strides_[d];
    return result;
  }
  Tensor matmul(const Tensor& other) const {
    const Tensor a = contiguous(), b = other.contiguous();
    const int64_t rows = a.size(0), depth = a.size(1), columns = b.size(1);
    Tensor result({rows, columns}, kFloat);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < depth; ++k) {
          sum += static_cast<double>(a.const_data_ptr<float>()[i * depth + k]) *
                 b.const_data_ptr<float>()[k * columns + j];
        }
        result.mutable_data_ptr<float>()[i * columns + j] = static_cast<float>(sum);
      }
    }
    return result;
  }
  // `other` has this tensor's shape, or that of its last dimension.
  Tensor sub(const Tensor& other) const { return with(other, std::minus<float>()); }
  Tensor mul(const Tensor& other) const { return with(other, std::multiplies<float>()); }
  Tensor sub_(const Tensor& other) {
    const Tensor result = sub(other);
    each([&](int64_t place, int64_t i) { floats()[place] = result.const_data_ptr<float>()[i]; });
    return *this;
  }
  Tensor any() const {
    Tensor result({}, kByte);
    result.zero_();
    each([&](int64_t place, int64_t) { *result.mutable_data_ptr<uint8_t>() |= floats()[place] != 0; });
    return result;
  }
  template <typename T>
  T item() const {
    return static_cast<T>(get(0));
  }

 private:
  float* floats() const { return reinterpret_cast<float*>(memory_.get()); }
  // visit(place, i) for each element in order; the place is in the memory, in elements.
  template <typename Visit>
  void each(const Visit& visit) const {
    for (int64_t i = 0; i < numel(); ++i) {
      int64_t place = offset_, rest = i;
      for (int64_t d = dim() - 1; d >= 0; rest /= sizes_[d--]) place += rest % sizes_[d] * strides_[d];
      visit(place, i);
    }
  }
  template <typename Operation>
  Tensor with(const Tensor& other, const Operation& operation) const {
    const Tensor right = other.contiguous();
    Tensor result(sizes_, kFloat);
    each([&](int64_t place, int64_t i) {
      result.mutable_data_ptr<float>()[i] =
          operation(floats()[place], right.const_data_ptr<float>()[i % right.numel()]);
    });
    return result;
  }
  // Of a contiguous tensor, as a double: exact for all that the operators convert.
  double get(int64_t i) const {
    switch (type_) {
      case kFloat:
        return const_data_ptr<float>()[i];
      case kBFloat16:
        return const_data_ptr<BFloat16>()[i];
      case kHalf:
        return const_data_ptr<Half>()[i];
      case kByte:
        return const_data_ptr<uint8_t>()[i];
      case kChar:
        return const_data_ptr<int8_t>()[i];
      case kInt:
        return const_data_ptr<int32_t>()[i];
      case kLong:
        return static_cast<double>(const_data_ptr<int64_t>()[i]);
      default:
        return const_data_ptr<double>()[i];
    }
  }
  void put(int64_t i, double value) {
    switch (type_) {
      case kFloat:
        mutable_data_ptr<float>()[i] = static_cast<float>(value);
        break;
      case kBFloat16:
        mutable_data_ptr<BFloat16>()[i] = static_cast<float>(value);
        break;
      case kHalf:
        mutable_data_ptr<Half>()[i] = static_cast<float>(value);
        break;
      case kChar:
        mutable_data_ptr<int8_t>()[i] = static_cast<int8_t>(value);
        break;
      default:
        throw std::logic_error("a conversion that no operator needs");
    }
  }

  std::vector<int64_t> sizes_, strides_;
  ScalarType type_ = kFloat;
  int64_t offset_ = 0;
  std::shared_ptr<char> memory_;
};
using TensorList = ArrayRef<Tensor>;

inline Tensor empty(std::vector<int64_t> sizes, TensorOptions options) {
  return Tensor(std::move(sizes), options.type);
}
inline Tensor empty(IntArrayRef sizes, TensorOptions options) {
  return Tensor(sizes.vec(), options.type);
}
inline Tensor empty(std::initializer_list<int64_t> sizes, TensorOptions options) {
  return Tensor(sizes, options.type);
}
inline Tensor zeros(std::initializer_list<int64_t> sizes, TensorOptions options) {
  return Tensor(sizes, options.type).zero_();
}
inline Tensor empty_like(const Tensor& tensor) {
  return Tensor(tensor.sizes().vec(), tensor.scalar_type());
}
inline Tensor empty_like(const Tensor& tensor, TensorOptions options, MemoryFormat) {
  return Tensor(tensor.sizes().vec(), options.type);
}

// of ATen/Parallel.h
inline int num_threads = 1;
inline int get_num_threads() {
  return num_threads;
}
inline bool in_parallel_region() {
  return false;
}

}  // namespace at

template <typename... Parts>
[[noreturn]] void fail(const char* kind, const Parts&... parts) {
  std::ostringstream text;
  text << kind << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}
#define TORCH_CHECK_VALUE(condition, ...) \
  if (!(condition)) fail("ValueError", __VA_ARGS__)
#define TORCH_CHECK_TYPE(condition, ...) \
  if (!(condition)) fail("TypeError", __VA_ARGS__)

#define AT_DISPATCH_CASE(TYPE, ...)                                                                                   \
  case TYPE: {                                                                                                        \
    using scalar_t =                                                                                                  \
        std::conditional_t<TYPE == at::kFloat, float, std::conditional_t<TYPE == at::kHalf, at::Half, at::BFloat16>>; \
    __VA_ARGS__();                                                                                                    \
    break;                                                                                                            \
  }
#define AT_DISPATCH_SWITCH(TYPE, NAME, ...)        \
  switch (TYPE) {                                  \
    __VA_ARGS__                                    \
    default:                                       \
      fail("TypeError", NAME, " takes no ", TYPE); \
  }

#include "library.h"
