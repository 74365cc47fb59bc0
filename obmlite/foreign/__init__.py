"""Weights that another library wrote: opened lazily, under other names and in other layouts, as ``obmlite.Weights``."""

from obmlite.foreign.names import Part
from obmlite.foreign.opening import open_weights
from obmlite.foreign.realign import realign
from obmlite.foreign.views import View

__all__ = ["Part", "View", "open_weights", "realign"]
