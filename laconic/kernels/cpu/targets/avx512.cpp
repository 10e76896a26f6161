// Every kernel, compiled for avx512.
#include "../isa.hpp"

#if LACONIC_X86

#define LACONIC_TARGET avx512
#include "../simd/avx512.hpp"
#include "../kernels.inl"

const laconic::Table& laconic::avx512_table() { return avx512::kTable; }

#endif
