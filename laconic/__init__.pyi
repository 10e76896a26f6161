# The public names, resolved when first touched. Families are reached as `laconic.norm` and so on.
from . import adapt as adapt
from . import binary as binary
from . import catalog as catalog
from . import distill as distill
from . import dynamic as dynamic
from . import embed as embed
from . import generate as generate
from . import graph as graph
from . import norm as norm
from . import optim as optim
from . import quant as quant
from . import search as search
from . import sparse as sparse
from . import testing as testing
from . import weight as weight
from . import zoo as zoo
from .core.fit import fit as fit
from .core.surgery import swap as swap
from .pipeline.blame import blame as blame
from .pipeline.blame import repair as repair
from .pipeline.calibrate import calibrate_confidence as calibrate_confidence
from .pipeline.compare import compare as compare
from .pipeline.compress import compress as compress
from .pipeline.compress import plan as plan
from .pipeline.examine import examine as examine
from .pipeline.export import export as export
from .pipeline.inspect import inspect as inspect
from .pipeline.load import load as load
from .pipeline.normalize import normalize as normalize
from .pipeline.save import save as save
from .tasks import fetch as fetch

__version__: str
