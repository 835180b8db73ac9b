#include "dfqvit/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace dfqvit {

Isa detected_isa() {
#if DFQVIT_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

Isa isa_from_name(const std::string& name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("isa was '" + name + "'; it may be 'portable', 'avx2' or 'avx512'");
}

namespace {

Isa checked(Isa isa) {
  if (isa > detected_isa()) {
    throw std::invalid_argument(std::string("isa was '") + isa_name(isa) + "'; this processor has up to '" +
                                isa_name(detected_isa()) + "'");
  }
  return isa;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> value = [] {
    const char* asked = std::getenv("DFQVIT_CPU_ISA");
    return asked && *asked ? checked(isa_from_name(asked)) : detected_isa();
  }();
  return value;
}

}  // namespace

Isa active_isa() {
  return active().load(std::memory_order_relaxed);
}

void set_active_isa(Isa isa) {
  active().store(checked(isa), std::memory_order_relaxed);
}

}  // namespace dfqvit
