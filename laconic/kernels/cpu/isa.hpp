// Which instruction sets this CPU has, and how a function is compiled for one of them.
//
// The extension is built for the plainest CPU of its architecture, so that a wheel runs anywhere; a hot
// loop is written once as an `always_inline` function and instantiated in thin wrappers that carry a
// `target` attribute. The wrapper to call is chosen at run time.
#pragma once

#include <string_view>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define LACONIC_X86 1
#define LACONIC_AVX2 __attribute__((target("avx2")))
#else
#define LACONIC_X86 0
#endif

#if defined(__GNUC__) || defined(__clang__)
#define LACONIC_INLINE inline __attribute__((always_inline))
#define LACONIC_RESTRICT __restrict__
#else
#define LACONIC_INLINE inline
#define LACONIC_RESTRICT
#endif

namespace laconic {

enum class Isa { baseline = 0, avx2 = 1 };

/// The best instruction set that this CPU offers and this build has code for.
inline Isa best_isa() {
#if LACONIC_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") ? Isa::avx2 : Isa::baseline;
  }();
  return best;
#else
  return Isa::baseline;
#endif
}

inline std::string_view name(Isa isa) { return isa == Isa::avx2 ? "avx2" : "baseline"; }

}  // namespace laconic
