// All kernels of one instruction set: LACONIC_TARGET names its namespace, which holds its `Simd`.
//
// No function of the standard library is called from here beyond what compiles to instructions: an inline function
// that were compiled for a newer CPU might be the copy that the linker keeps for everyone.
#include <cstddef>
#include <cstdint>

#include "bits.hpp"
#include "conv.hpp"
#include "cache.hpp"
#include "halves.hpp"
#include "kernels.hpp"
#include "linear.hpp"
#include "norm.hpp"
#include "sparse.hpp"
#include "table.hpp"
#include "unroll.hpp"

#include "activation.inl"
#include "weight_only.inl"
#include "integer.inl"
#include "integer_rows.inl"
#include "dense.inl"
#include "attention.inl"
#include "block.inl"
#include "bits.inl"
#include "conv.inl"
#include "elements.inl"
#include "unpack.inl"
#include "dequantize.inl"
#include "hadamard.inl"
#include "norm.inl"
#include "sparse.inl"
#include "cache.inl"

namespace laconic::LACONIC_TARGET {

static const Table kTable{
    .lanes = Simd::kLanes,
    .lay_planes = lay_planes,
    .linear_planes = linear_planes,
    .linear_rows = linear_rows,
    .panel = kPanel,
    .tile = kTile,
    .round_inputs = round_inputs,
    .sum_inputs = sum_inputs,
    .linear_int8 = linear_int8,
    .rows_sizes = rows_sizes,
    .lay_rows = lay_rows,
    .linear_int8_rows = linear_int8_rows,
    .dense_scratch = dense_scratch,
    .linear_dense = linear_dense,
    .dense_rows = dense_rows,
    .attend = attend,
    .rotate_rows = rotate_rows,
    .multiply = multiply,
    .mismatch_panels = mismatch_panels,
    .mismatch_rows = mismatch_rows,
    .byte_panels = byte_panels,
    .lay_panel = lay_panel,
    .add_counts = add_counts,
    .finish_bits = finish_bits,
    .sign_row = sign_row,
    .plane_row = plane_row,
    .map_signs = map_signs,
    .map_bytes = map_bytes,
    .leave_out = leave_out,
    .sum_bytes = sum_bytes,
    .finish_conv = finish_conv,
    .unpack_row = unpack_row,
    .dequantize_rows = dequantize_rows,
    .hadamard_rows = hadamard_rows,
    .norm_forward = norm_forward,
    .norm_backward = norm_backward,
    .add_parts = add_parts,
    .to_floats = to_floats,
    .sparse_few = sparse_few,
    .lay_columns = lay_columns,
    .sparse_many = sparse_many,
    .attend_cache = attend_cache,
    .join_cache = join_cache,
    .append_cache = append_cache,
};

}  // namespace laconic::LACONIC_TARGET
