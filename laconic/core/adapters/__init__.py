"""laconic's hooks on other people's training loops: transformers' Trainer and Lightning.

Both come as a callback, for hooks that do not touch batch or loss, and as a subclass factory for all hooks, since
neither loop lets a callback change these. Nothing is imported before it is used.
"""

from .lightning_hooks import hooked_module, lightning_callback
from .trainer_hooks import hooked_trainer, trainer_callback

__all__ = ["hooked_module", "hooked_trainer", "lightning_callback", "trainer_callback"]
