# The public names: `from ._<id> import Name as Name`, sorted by module. `laconic new` adds its own.
from ._llama_lm import LlamaLM as LlamaLM
from ._llama_lm import LlamaLMConfig as LlamaLMConfig
from ._residual import SCHEMES as SCHEMES
from ._residual import Placement as Placement
from ._residual import Residual as Residual
from ._resnet_cifar import ResNetCifar as ResNetCifar
from ._resnet_cifar import ResNetCifarConfig as ResNetCifarConfig
