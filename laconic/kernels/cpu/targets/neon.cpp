// Every kernel, compiled for neon.
#include "../isa.hpp"

#if LACONIC_ARM

#define LACONIC_TARGET neon
#include "../simd/neon.hpp"
#include "../kernels.inl"

const laconic::Table& laconic::neon_table() { return neon::kTable; }

#endif
