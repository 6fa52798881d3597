"""Kinds of layers that need more than a rule for an operation; a new one is a file here and a line in `KINDS`."""

from algoperf_kfac.pytorch.kinds._base import Found, Kind, Site, Watch
from algoperf_kfac.pytorch.kinds.lstm import LSTM
from algoperf_kfac.pytorch.kinds.tied_table import TiedTable

# Asked in this order.
KINDS: tuple[type[Kind], ...] = (
    LSTM,
    TiedTable,
)

__all__ = ["KINDS", "Found", "Kind", "Site", "Watch"]
