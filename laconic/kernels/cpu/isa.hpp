// Which instruction sets this build has code for, and the best of them that this CPU offers.
//
// The extension is built for the plainest CPU of its architecture, so that a wheel runs anywhere. Each file of
// targets/ compiles every kernel once more for one instruction set; which of them runs is chosen at run time.
#pragma once

#include <string_view>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define LACONIC_X86 1
#else
#define LACONIC_X86 0
#endif

#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define LACONIC_ARM 1
#else
#define LACONIC_ARM 0
#endif

#if defined(LACONIC_SANITIZE)
// With a check before every access, what is inlined and unrolled by force takes minutes to compile. Copies for the
// plainest CPU are linked first, so they are the ones that are kept.
#define LACONIC_INLINE inline
#define LACONIC_RESTRICT __restrict__
#elif defined(__GNUC__) || defined(__clang__)
#define LACONIC_INLINE inline __attribute__((always_inline))
#define LACONIC_RESTRICT __restrict__
#else
#define LACONIC_INLINE inline
#define LACONIC_RESTRICT
#endif

namespace laconic {

/// Asks for the cache line of p, which may lie anywhere: rows end where the CPU's own guesses do.
LACONIC_INLINE void prefetch(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p);
#else
  static_cast<void>(p);
#endif
}

/// avx512 means what Ice Lake and Zen 4 brought: F, BW, DQ, VL, VNNI, VBMI, BITALG and VPOPCNTDQ. An architecture
/// numbers its own sets from 0, the plainest; `neon` shares the 1 of `avx2`.
enum class Isa { portable = 0, avx2 = 1, neon = 1, avx512 = 2 };

inline Isa best_isa() {
#if LACONIC_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::portable;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vpopcntdq");
    return wide ? Isa::avx512 : Isa::avx2;
  }();
  return best;
#elif LACONIC_ARM
  return Isa::neon;
#else
  return Isa::portable;
#endif
}

inline std::string_view name(Isa isa) {
  switch (static_cast<int>(isa)) {
    case 1: return LACONIC_ARM ? "neon" : "avx2";
    case 2: return "avx512";
    default: return "portable";
  }
}

}  // namespace laconic
