// All kernels of one instruction set: LACONIC_TARGET names its namespace, which holds its `Simd`.
//
// No function of the standard library is called from here beyond what compiles to instructions: an inline function
// that were compiled for a newer CPU might be the copy that the linker keeps for everyone.
#include <cstddef>
#include <cstdint>

#include "halves.hpp"
#include "kernels.hpp"
#include "linear.hpp"
#include "table.hpp"

#include "activation.inl"
#include "weight_only.inl"

namespace laconic::LACONIC_TARGET {

static const Table kTable{
    .lanes = Simd::kLanes,
    .lay_planes = lay_planes,
    .linear_planes = linear_planes,
    .linear_rows = linear_rows,
};

}  // namespace laconic::LACONIC_TARGET
