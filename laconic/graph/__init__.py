"""Graphs: networks on them, embeddings of their nodes, and links to come."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
