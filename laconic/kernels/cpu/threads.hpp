// Splitting a loop over torch's own OpenMP threads: the extension has no pool of its own.
//
// The OpenMP runtime is not linked: laconic.kernels.native makes the one that torch has loaded visible first, so
// that both share it. How many threads to use is the caller's word (torch.get_num_threads()).
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace laconic {

/// f(begin, end, thread) over [0, n) in runs of whole `grain`s, one run a thread. The split never changes a result: no
/// kernel adds up across tasks.
template <class F>
void parallel(int threads, std::int64_t n, std::int64_t grain, const F& f) {
  const std::int64_t grains = (n + grain - 1) / grain;
  if (threads > grains) threads = static_cast<int>(grains);
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    {
      const std::int64_t count = omp_get_num_threads(), me = omp_get_thread_num();
      const std::int64_t begin = grains * me / count * grain, stop = grains * (me + 1) / count * grain;
      const std::int64_t end = stop < n ? stop : n;
      if (begin < end) f(begin, end, static_cast<int>(me));
    }
    return;
  }
#endif
  if (n > 0) f(std::int64_t{0}, n, 0);
}

}  // namespace laconic
