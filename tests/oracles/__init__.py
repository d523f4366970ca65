"""Every method as lists and loops, written from its rule and sharing no code with the package: the oracles.

One sequence, one layer, float64, no pages. A test feeds an oracle turn by turn (`play`) and compares what it returns
and records with what the real policy does.
"""

from oracles.budget import H2O, TOVA, Random, SnapKV
from oracles.dense import Dense, Slot
from oracles.dmc import DMC
from oracles.draws import Turns, play, random_inputs, token_count, turns
from oracles.quest import DMSQuest, Quest
from oracles.window import DMS, Streaming

__all__ = [
    "DMC",
    "DMS",
    "H2O",
    "TOVA",
    "DMSQuest",
    "Dense",
    "Quest",
    "Random",
    "Slot",
    "SnapKV",
    "Streaming",
    "Turns",
    "play",
    "random_inputs",
    "token_count",
    "turns",
]
