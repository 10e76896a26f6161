# The public names: `from ._<id> import Name as Name`, sorted by module. `laconic new` adds its own.
from ._adab2n import AdaB2N as AdaB2N
from ._adab2n import AdaB2NContext as AdaB2NContext
from ._adab2n import task_weights as task_weights
from ._adab2n import weighted_statistics as weighted_statistics
from ._alpha_bn import AlphaBN as AlphaBN
from ._alpha_bn import Core as Core
from ._alpha_bn import class_confusion as class_confusion
from ._alpha_bn import mixed_statistics as mixed_statistics
from ._unmix_tns import UnMixNorm as UnMixNorm
from ._unmix_tns import UnMixTNS as UnMixTNS
from ._unmix_tns import assignments as assignments
from ._unmix_tns import batch_momentum as batch_momentum
from ._unmix_tns import first_components as first_components
from ._unmix_tns import unmixed_statistics as unmixed_statistics
