// All kernels of one instruction set: LACONIC_TARGET names its namespace, which holds its `Simd`.
//
// No function of the standard library is called from here beyond what compiles to instructions: an inline function
// that were compiled for a newer CPU might be the copy that the linker keeps for everyone.
#include <cstddef>
#include <cstdint>

#include "halves.hpp"
#include "kernels.hpp"
#include "linear.hpp"
#include "norm.hpp"
#include "table.hpp"

#include "activation.inl"
#include "weight_only.inl"
#include "elements.inl"
#include "unpack.inl"
#include "dequantize.inl"
#include "hadamard.inl"
#include "norm.inl"

namespace laconic::LACONIC_TARGET {

static const Table kTable{
    .lanes = Simd::kLanes,
    .lay_planes = lay_planes,
    .linear_planes = linear_planes,
    .linear_rows = linear_rows,
    .unpack_row = unpack_row,
    .dequantize_rows = dequantize_rows,
    .hadamard_rows = hadamard_rows,
    .norm_rows = norm_rows,
    .norm_rows_backward = norm_rows_backward,
    .add_parts = add_parts,
    .to_floats = to_floats,
};

}  // namespace laconic::LACONIC_TARGET
