"""BDH, the Dragon Hatchling: linear attention over sparse, positive neurons."""

from model.bdh.model import BDH
from model.bdh.upstream import from_upstream, to_upstream

__all__ = ["BDH", "from_upstream", "to_upstream"]
