"""Kinds of layers that need more than a rule for an operation; a new one is a file here and a line in `KINDS`."""

from algoperf_kfac.pytorch.kinds._base import AnyRecorder, Found, Kind, Site, Watch
from algoperf_kfac.pytorch.kinds.attention import Attention
from algoperf_kfac.pytorch.kinds.recurrent import Recurrent
from algoperf_kfac.pytorch.kinds.tied_table import TiedTable

# Asked in this order.
KINDS: tuple[type[Kind], ...] = (
    Recurrent,
    TiedTable,
    Attention,
)

__all__ = ["KINDS", "AnyRecorder", "Found", "Kind", "Site", "Watch"]
