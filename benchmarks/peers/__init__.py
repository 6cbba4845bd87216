"""What the ops are compared with: other implementations of the same thing, where they can be imported and work.

A peer prepares what it needs of a case (converted weights are not timed) and gives one closure for each set of
inputs. Its output is checked like a backend's, with a tolerance for other roundings. ``Peer.what`` says what it
computes.
"""

from __future__ import annotations

from ._peer import Peer, Prepared, Unsuitable, WeightPeer
from .gemms import GEMMS, WEIGHT_ONLY
from .quantizers import QUANTIZERS

__all__ = ["NAMES", "PEERS", "WEIGHT_ONLY", "Peer", "Prepared", "Unsuitable", "WeightPeer"]

PEERS = (*GEMMS, *QUANTIZERS)
NAMES = tuple(dict.fromkeys(peer.name for peer in PEERS))
