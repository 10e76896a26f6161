"""Normalization: methods that fold, replace or repair norms."""

from ._fold_batchnorm import Fold, fold_batchnorm, fold_shapes, foldable

__all__ = ["Fold", "fold_batchnorm", "fold_shapes", "foldable"]
