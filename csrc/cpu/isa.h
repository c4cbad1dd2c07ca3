// Instruction sets and storage types: what every CPU kernel file includes first.
//
// A kernel file is written once and compiled once per instruction set: it names itself in FASTLM_FILE and
// includes foreach_isa.h, which includes it again inside a `#pragma GCC target` region for each set, with
// FASTLM_ISA defined as the namespace to put the kernels in. What follows the passes picks one at run time.
// No compiler flag names an instruction set, so one binary serves every x86-64 CPU (and, with the baseline
// alone, every other architecture).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "cpu/machine.h"

#if defined(__x86_64__)
#define FASTLM_X86 1
#include <immintrin.h>
#else
#define FASTLM_X86 0
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastlm {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// The instruction set in force: the best one this CPU has, unless set_isa chose a lesser one.
Isa isa();
bool isa_chosen();  // whether by set_isa

// The same numbers as in fastlm/backends/cpu.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Throws std::invalid_argument: `argument` of `op` has a type that no kernel serves. `wanted`: the codes of those that do.
[[noreturn]] void unsupported_type(const char* op, const char* argument, int type, std::initializer_list<int> wanted);
// The same of several arguments whose types have to go together.
[[noreturn]] void unsupported_types(const char* op, const char* arguments, std::initializer_list<int> types,
                                    const char* wanted);

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastlm

// Calls `fn` of the instruction set in force. Sets above avx512 share its kernels unless a file says otherwise.
#if FASTLM_X86
#define FASTLM_DISPATCH(fn, ...)                                       \
  (::fastlm::isa() >= ::fastlm::Isa::avx512  ? avx512::fn(__VA_ARGS__) \
   : ::fastlm::isa() == ::fastlm::Isa::avx2 ? avx2::fn(__VA_ARGS__)   \
                                            : baseline::fn(__VA_ARGS__))
// For files with a pass of their own for avx512_bf16.
#define FASTLM_DISPATCH_BF16(fn, ...)                                                        \
  (::fastlm::isa() >= ::fastlm::Isa::avx512_bf16 ? avx512_bf16::fn(__VA_ARGS__)              \
                                                 : FASTLM_DISPATCH(fn, __VA_ARGS__))
#else
#define FASTLM_DISPATCH(fn, ...) baseline::fn(__VA_ARGS__)
#define FASTLM_DISPATCH_BF16(fn, ...) baseline::fn(__VA_ARGS__)
#endif
