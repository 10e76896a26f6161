"""The ops that run packed weights, a plain PyTorch reference of each that is the truth, and native kernels."""
