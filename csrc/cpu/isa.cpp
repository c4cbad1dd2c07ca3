// Which instruction set the kernels use, and the errors of types that none of them serves.

#include "cpu/isa.h"

#include <stdexcept>
#include <string>

#include "cpu/ops.h"

#if FASTLM_X86
#include <cpuid.h>
#endif
#if FASTLM_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlm {

namespace {

// Tiles hold 8 KiB of state, which Linux gives a process only on request (arch_prctl ARCH_REQ_XCOMP_PERM).
bool amx() {
#if FASTLM_X86 && defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned tiles = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles at all, int8
  return (d & tiles) == tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

Isa detect() {
#if FASTLM_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
    return Isa::baseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
  return amx() ? Isa::amx : Isa::avx512_bf16;
#else
  return Isa::baseline;
#endif
}

const Isa g_best = detect();
Isa g_isa = g_best;
bool g_chosen = false;

}  // namespace

Isa isa() { return g_isa; }
bool isa_chosen() { return g_chosen; }
Isa best_isa() { return g_best; }
bool is_intel() {
#if FASTLM_X86
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}
bool set_isa(Isa wanted) {
  if (wanted > g_best) return false;
  g_isa = wanted;
  g_chosen = true;
  return true;
}

namespace {

const char* const kNames[] = {"float32", "float64", "bfloat16", "float16"};

std::string name_of(int type) {
  return type >= 0 && type < 4 ? kNames[type] : "dtype code " + std::to_string(type);
}

std::string joined(std::initializer_list<int> types, const char* last) {
  std::string text;
  size_t left = types.size();
  for (const int type : types) {
    text += name_of(type);
    if (--left) text += left > 1 ? ", " : last;
  }
  return text;
}

}  // namespace

void unsupported_type(const char* op, const char* argument, int type, std::initializer_list<int> wanted) {
  throw std::invalid_argument(std::string(op) + ": " + argument + " has got " + name_of(type) + ", expected " +
                              joined(wanted, " or "));
}

void unsupported_types(const char* op, const char* arguments, std::initializer_list<int> types, const char* wanted) {
  throw std::invalid_argument(std::string(op) + ": " + arguments + " have got " + joined(types, " and ") +
                              ", expected " + wanted);
}

}  // namespace fastlm
