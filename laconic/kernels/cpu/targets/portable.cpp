// Every kernel, compiled for portable.
#include "../isa.hpp"

#define LACONIC_TARGET portable
#include "../simd/portable.hpp"
#include "../kernels.inl"

const laconic::Table& laconic::portable_table() { return portable::kTable; }
