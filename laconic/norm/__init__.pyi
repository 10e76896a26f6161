# The public names: `from ._<id> import Name as Name`, sorted by module. `laconic new` adds its own.
from ._fold_batchnorm import Fold as Fold
from ._fold_batchnorm import FoldBatchNorm as FoldBatchNorm
from ._fold_batchnorm import fold_batchnorm as fold_batchnorm
from ._fold_batchnorm import fold_shapes as fold_shapes
from ._fold_batchnorm import foldable as foldable
