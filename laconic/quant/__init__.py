"""Quantization: weights in fewer bits, and the passes that prepare for it and repair after it.

- `round_to_nearest`: no data, the baseline. `gptq_matrix`: rounds against a `Hessian` of calibration inputs.
- `smooth_scales`, `apply_smooth`: move outliers of activations into weights, exactly, before.
- `tune_scales`, `refine_codes`, `tune`, `bias_correction`: take back a part of the error, after.
"""

from ._bias_correction import bias_correction
from ._gptq import Factor, Hessian, conv_inputs, gptq_matrix, inverse_factor, output_error
from ._rtn import Solved, round_to_nearest
from ._scale_tuning import Tuned, refine_codes, tune, tune_scales
from ._smoothquant import Smoothed, apply_smooth, smooth_norm, smooth_scales

__all__ = [
    "Factor",
    "Hessian",
    "Smoothed",
    "Solved",
    "Tuned",
    "apply_smooth",
    "bias_correction",
    "conv_inputs",
    "gptq_matrix",
    "inverse_factor",
    "output_error",
    "refine_codes",
    "round_to_nearest",
    "smooth_norm",
    "smooth_scales",
    "tune",
    "tune_scales",
]
