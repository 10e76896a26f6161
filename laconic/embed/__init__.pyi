# The public names: `from ._<id> import Name as Name`, sorted by module. `laconic new` adds its own.
from ._mrl import MatryoshkaHead as MatryoshkaHead
from ._mrl import MatryoshkaLoss as MatryoshkaLoss
from ._mrl import adaptive_search as adaptive_search
from ._mrl import funnel_search as funnel_search
from ._mrl import nested_cross_entropy as nested_cross_entropy
from ._mrl import search_cost as search_cost
from ._nmc import NearestMean as NearestMean
from ._nmc import incremental_accuracies as incremental_accuracies
from ._nmc import nearest_mean_scores as nearest_mean_scores
from ._views import View as View
from ._views import nested as nested
