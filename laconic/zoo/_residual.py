"""The residual block of all models here: `laconic.core.placement`, under its public names."""

from laconic.core.placement import SCHEMES, Placement, Residual, Scheme, mix, placements

__all__ = ["SCHEMES", "Placement", "Residual", "Scheme", "mix", "placements"]

CARD = None
