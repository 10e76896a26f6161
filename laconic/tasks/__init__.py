"""Small real tasks: a model, its data, a metric; the user's own data as a task; what is fetched for them."""

from __future__ import annotations

from .base import SPLITS, Task
from .bundled import TASKS, own_model
from .data import check_counts, load_task
from .fetch import BUNDLES, PACKAGES, cache_folder, fetch, fetch_package, is_fetched
from .metrics import ACCURACY, FIDELITY, PERPLEXITY, Comparison, Evaluation, Metric, compare, pair
from .zoo import MODELS, zoo_source

__all__ = [
    "ACCURACY",
    "BUNDLES",
    "FIDELITY",
    "MODELS",
    "PACKAGES",
    "PERPLEXITY",
    "SPLITS",
    "TASKS",
    "Comparison",
    "Evaluation",
    "Metric",
    "Task",
    "cache_folder",
    "check_counts",
    "compare",
    "fetch",
    "fetch_package",
    "is_fetched",
    "load_task",
    "own_model",
    "pair",
    "zoo_source",
]
