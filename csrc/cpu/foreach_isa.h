// Includes FASTLM_FILE once per instruction set; see isa.h. No include guard: each kernel file uses it once.
// Every header with functions of its own must be included before this one, or be written for inclusion inside
// a pass (vec.h, types.h, philox.h): a function that is first seen inside a target region belongs to that region.

#if FASTLM_X86

#ifdef FASTLM_WANT_BF16
// Two more passes for files with kernels of their own for bf16: dot products of pairs, and tiles.
#define FASTLM_ISA amx
#define FASTLM_ISA_LEVEL 4
#define FASTLM_VEC_BYTES 64
#ifdef __clang__
#pragma clang attribute push(                                                                             \
    __attribute__((target(                                                                                \
        "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,amx-int8,avx2,fma,f16c,bmi2"))),          \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,amx-int8,avx2,fma,f16c,bmi2")
#endif
#include "cpu/vec.h"
#include "cpu/types.h"
#include "cpu/philox.h"
#include FASTLM_FILE
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTLM_ISA
#undef FASTLM_ISA_LEVEL
#undef FASTLM_VEC_BYTES

#define FASTLM_ISA avx512_bf16
#define FASTLM_ISA_LEVEL 3
#define FASTLM_VEC_BYTES 64
#ifdef __clang__
#pragma clang attribute push(                                                                             \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c,bmi2"))),          \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c,bmi2")
#endif
#include "cpu/vec.h"
#include "cpu/types.h"
#include "cpu/philox.h"
#include FASTLM_FILE
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTLM_ISA
#undef FASTLM_ISA_LEVEL
#undef FASTLM_VEC_BYTES
#endif  // FASTLM_WANT_BF16

#define FASTLM_ISA avx512
#define FASTLM_ISA_LEVEL 2
#define FASTLM_VEC_BYTES 64
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif
#include "cpu/vec.h"
#include "cpu/types.h"
#include "cpu/philox.h"
#include FASTLM_FILE
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTLM_ISA
#undef FASTLM_ISA_LEVEL
#undef FASTLM_VEC_BYTES

#define FASTLM_ISA avx2
#define FASTLM_ISA_LEVEL 1
#define FASTLM_VEC_BYTES 32
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#include "cpu/vec.h"
#include "cpu/types.h"
#include "cpu/philox.h"
#include FASTLM_FILE
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTLM_ISA
#undef FASTLM_ISA_LEVEL
#undef FASTLM_VEC_BYTES

#endif  // FASTLM_X86

#define FASTLM_ISA baseline
#define FASTLM_ISA_LEVEL 0
#define FASTLM_VEC_BYTES 16
#include "cpu/vec.h"
#include "cpu/types.h"
#include "cpu/philox.h"
#include FASTLM_FILE
#undef FASTLM_ISA
#undef FASTLM_ISA_LEVEL
#undef FASTLM_VEC_BYTES
