# The public names: `from ._<id> import Name as Name`, sorted by module. `laconic new` adds its own.
from ._distill_hook import Distill as Distill
from ._distill_hook import Match as Match
from ._distill_hook import layer_map as layer_map
from ._distill_hook import regressor as regressor
from ._kd_toolbox import AttentionMapKD as AttentionMapKD
from ._kd_toolbox import AttentionTransfer as AttentionTransfer
from ._kd_toolbox import FeatureMSE as FeatureMSE
from ._kd_toolbox import HardLabelKD as HardLabelKD
from ._kd_toolbox import KDLoss as KDLoss
from ._kd_toolbox import RelationKD as RelationKD
