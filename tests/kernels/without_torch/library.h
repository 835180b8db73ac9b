// Stands for torch/library.h: operators by their names, called with arguments that are read from a stream. A request is
// the operator's name and its arguments, an answer "R" and tensors, or "E" and the message of an exception; see
// tests/kernels/emulated.py, which writes the one and reads the other.
#pragma once

#include <cstdio>
#include <map>
#include <tuple>
#include <type_traits>

namespace stream {

template <typename T>
T number() {
  T value;
  if (std::fread(&value, sizeof(value), 1, stdin) != 1) std::exit(0);  // the other side is done
  return value;
}
inline void bytes(void* to, size_t count) {
  if (count > 0 && std::fread(to, 1, count, stdin) != count) std::exit(1);
}
inline std::string text() {
  std::string value(number<int64_t>(), '\0');
  bytes(value.data(), value.size());
  return value;
}
inline at::Tensor tensor() {
  const auto type = static_cast<at::ScalarType>(number<int64_t>());
  std::vector<int64_t> sizes(number<int64_t>());
  bytes(sizes.data(), sizes.size() * sizeof(int64_t));
  at::Tensor value(sizes, type);
  bytes(value.mutable_data_ptr(), value.nbytes());
  return value;
}

// What an argument of type T is read into.
template <typename T>
struct Kept {
  T value = number<T>();
};
template <>
struct Kept<bool> {
  bool value = number<int64_t>() != 0;
};
template <>
struct Kept<c10::string_view> {
  std::string value = text();
};
template <>
struct Kept<at::Tensor> {
  at::Tensor value = tensor();
};
template <>
struct Kept<std::optional<at::Tensor>> {
  std::optional<at::Tensor> value = number<int64_t>() ? std::optional<at::Tensor>(tensor()) : std::nullopt;
};
template <typename T>
struct Kept<at::ArrayRef<T>> {
  std::vector<T> value;
  Kept() {
    for (int64_t left = number<int64_t>(); left > 0; --left) value.push_back(Kept<T>().value);
  }
};

template <typename T>
void put(const T& value) {
  std::fwrite(&value, sizeof(value), 1, stdout);
}
inline void put(const std::string& value) {
  put<int64_t>(value.size());
  std::fwrite(value.data(), 1, value.size(), stdout);
}
inline void put(const at::Tensor& value) {
  const at::Tensor whole = value.contiguous();
  put<int64_t>(static_cast<int64_t>(whole.scalar_type()));
  put<int64_t>(whole.dim());
  for (int64_t size : whole.sizes()) put<int64_t>(size);
  std::fwrite(whole.const_data_ptr(), 1, whole.nbytes(), stdout);
}
inline void answer(const at::Tensor& result) {
  std::fputc('R', stdout);
  put<int64_t>(1);
  put(result);
}
inline void answer(const std::tuple<at::Tensor, at::Tensor>& result) {
  std::fputc('R', stdout);
  put<int64_t>(2);
  put(std::get<0>(result));
  put(std::get<1>(result));
}

}  // namespace stream

namespace torch {

class Library {
 public:
  static std::map<std::string, std::function<void()>>& operators() {
    static std::map<std::string, std::function<void()>> all;
    return all;
  }
  template <typename Result, typename... Arguments>
  void impl(const char* name, Result (*function)(Arguments...)) {
    operators()[name] = [function] {
      std::tuple<stream::Kept<std::decay_t<Arguments>>...> kept{
          stream::Kept<std::decay_t<Arguments>>{}...};  // in order
      std::apply([&](auto&... each) { stream::answer(function(each.value...)); }, kept);
    };
  }
};

}  // namespace torch

#define DFQVIT_JOINED_(a, b) a##b
#define DFQVIT_JOINED(a, b) DFQVIT_JOINED_(a, b)
#define TORCH_LIBRARY_IMPL(NAMESPACE, KEY, NAME) DFQVIT_REGISTERED(NAME, DFQVIT_JOINED(registered_, __COUNTER__))
#define DFQVIT_REGISTERED(NAME, FUNCTION)                 \
  static void FUNCTION(torch::Library&);                  \
  static const bool DFQVIT_JOINED(FUNCTION, _done) = [] { \
    torch::Library library;                               \
    FUNCTION(library);                                    \
    return true;                                          \
  }();                                                    \
  static void FUNCTION(torch::Library& NAME)
