"""Adaptation to other data: at test time, in a stream, and across clients."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
