// Loops of a known length, unrolled before the optimizer looks: arrays that they index become registers.
//
// A pragma would unroll later than compilers split arrays, and every sum would be stored in each turn of a loop.
#pragma once

#include <utility>

#include "isa.hpp"

#if (defined(__GNUC__) || defined(__clang__)) && !defined(LACONIC_SANITIZE)
#define LACONIC_UNROLLED __attribute__((always_inline))
#else
#define LACONIC_UNROLLED
#endif

namespace laconic {

/// Rows that a block of a product holds at most. Where sanitizers check every access, low blocks with the same
/// remainders compile in a fraction of the time.
#if defined(LACONIC_SANITIZE)
constexpr int kMostRows = 2;
#else
constexpr int kMostRows = 4;
#endif

/// An index that is part of the type.
template <int I>
struct Number {
  constexpr operator int() const { return I; }
};

/// f(0), f(1), ... f(N - 1), where f is a lambda marked LACONIC_UNROLLED.
template <int N, class F>
LACONIC_INLINE void unroll(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) LACONIC_UNROLLED { (f(Number<I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

}  // namespace laconic
