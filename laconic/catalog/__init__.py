"""Discovery: which methods there are, what each is, which fits a wish, and how a new one begins."""

from laconic.catalog.read import Catalog, problems, read
from laconic.catalog.source import Method

__all__ = ["Catalog", "Method", "problems", "read"]
