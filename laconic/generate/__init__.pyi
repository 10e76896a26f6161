# The public names: `from ._<id> import Name as Name`, sorted by module. `laconic new` adds its own.
from ._dbs import DiverseBeamSearch as DiverseBeamSearch
from ._dbs import Hypothesis as Hypothesis
from ._pc_codec import HCLT as HCLT
from ._pc_codec import PCCodec as PCCodec
from ._pc_codec import chow_liu_tree as chow_liu_tree
from ._pc_codec import learn_hclt as learn_hclt
from ._pc_codec import quantize_pmf as quantize_pmf
