"""Sparsity: what to prune, when, and how to keep what it did."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
