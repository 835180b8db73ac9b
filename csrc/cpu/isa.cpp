#include "dfqvit/isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if DFQVIT_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif DFQVIT_ARM && defined(__linux__)
#include <sys/auxv.h>
#elif DFQVIT_ARM && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace dfqvit {

namespace {

#if defined(__aarch64__) || defined(_M_ARM64)
constexpr const char* kNames[] = {"portable", "neon", "dotprod", "i8mm"};
#else
constexpr const char* kNames[] = {"portable", "avx2", "avx512", "amx"};
#endif

#if DFQVIT_ARM
#if defined(__APPLE__)
bool has(const char* feature) {
  int32_t value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

// Elsewhere than on Linux and macOS neon has to do.
Isa detect() {
  bool dots = false, matrices = false;
#if defined(__linux__)
  constexpr unsigned long kDots = 1ul << 20, kMatrices = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
  dots = (getauxval(AT_HWCAP) & kDots) != 0;
  matrices = (getauxval(AT_HWCAP2) & kMatrices) != 0;
#elif defined(__APPLE__)
  dots = has("hw.optional.arm.FEAT_DotProd");
  matrices = has("hw.optional.arm.FEAT_I8MM");
#endif
  return !dots ? Isa::neon : matrices ? Isa::i8mm : Isa::dotprod;
}
#elif DFQVIT_X86
// AMX: the processor's int8 tiles, and Linux's permission for this process to hold tile state, which is asked for here.
bool amx_granted() {
#if defined(__linux__)
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
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return amx_granted() ? Isa::amx : Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
  return Isa::portable;
}
#else
Isa detect() {
  return Isa::portable;
}
#endif

}  // namespace

bool has_avx512_vnni() {
#if DFQVIT_X86
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool has_avx_vnni() {
#if DFQVIT_AVXVNNI
  static const bool found = [] {
    constexpr unsigned kAvxVnni = 1u << 4;  // of CPUID leaf 7, part 1, EAX
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnni) != 0;
  }();
  return found;
#else
  return false;
#endif
}

Isa detected_isa() {
  static const Isa detected = detect();
  return detected;
}

const char* isa_name(Isa isa) {
  return kNames[static_cast<int>(isa)];
}

Isa isa_from_name(const std::string& name) {
  for (int i = 0; i < 4; ++i) {
    if (name == kNames[i]) return static_cast<Isa>(i);
  }
  throw std::invalid_argument("isa was '" + name + "'; it may be '" + kNames[0] + "', '" + kNames[1] + "', '" +
                              kNames[2] + "' or '" + kNames[3] + "'");
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
