"""Adapters, tensors in and tensors out: how they start, how they are laid out and converted."""

from geoscope.adapters.factors import LoraFactors
from geoscope.adapters.geora import geora
from geoscope.adapters.lora import lora
from geoscope.adapters.milora import milora
from geoscope.adapters.olora import olora
from geoscope.adapters.pissa import pissa
from geoscope.adapters.rlpo import rlmo, rlpo
from geoscope.adapters.table import INITIALISATIONS, Initialisation

__all__ = [
    "INITIALISATIONS",
    "Initialisation",
    "LoraFactors",
    "geora",
    "lora",
    "milora",
    "olora",
    "pissa",
    "rlmo",
    "rlpo",
]
