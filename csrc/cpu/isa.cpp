#include "dfqvit/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dfqvit {

namespace {

// AMX: the processor's int8 tiles, and Linux's permission for this process to hold tile state, which is asked for here.
bool amx_granted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;      // of CPUID leaf 7, EDX
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & kTile) == 0 || (edx & kInt8) == 0 || !has_avx512_vnni()) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
#if DFQVIT_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return amx_granted() ? Isa::amx : Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

}  // namespace

bool has_avx512_vnni() {
#if DFQVIT_X86
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

Isa detected_isa() {
  static const Isa detected = detect();
  return detected;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

Isa isa_from_name(const std::string& name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("isa was '" + name + "'; it may be 'portable', 'avx2', 'avx512' or 'amx'");
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
    if (!asked || !*asked) return detected_isa();
    try {
      return checked(isa_from_name(asked));
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("DFQVIT_CPU_ISA: " + std::string(error.what()));
    }
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
