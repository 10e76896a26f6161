"""Quantization: weights in fewer bits, and the passes that prepare for it and repair after it.

- `round_to_nearest`: no data, the baseline. `gptq_matrix`: rounds against a `Hessian` of calibration inputs.
- `solve_calibrated`: what `compress` uses, GPTQ and its repair for all matrices that read the same inputs.
- `smooth_scales`, `apply_smooth`: move outliers of activations into weights, exactly, before.
- `tune_scales`, `refine_codes`, `tune`, `bias_correction`: take back a part of the error, after.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
