// Every kernel, compiled for avx2.
#include "../isa.hpp"

#if LACONIC_X86

#define LACONIC_TARGET avx2
#include "../simd/avx2.hpp"
#include "../kernels.inl"

const laconic::Table& laconic::avx2_table() { return avx2::kTable; }

#endif
