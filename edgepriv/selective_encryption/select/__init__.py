"""Which weights to encrypt: scores for units, and the choice of a share of them (torch).

Strategies: ``fisher`` (default; no training), ``decoy-gates`` (gates trained against the decoy itself, all layers
jointly), ``pss`` (as published: hard-concrete gates, layer by layer, one ratio), ``magnitude`` (needs no data and no
torch graph), ``random``. A score is one number a unit; larger = encrypt first. ``choose`` turns scores into positions
within a global or a per-layer budget.
"""

from edgepriv.selective_encryption.select.choose import Choice, choose
from edgepriv.selective_encryption.select.gates import decoy_gates, pss_gates
from edgepriv.selective_encryption.select.network import Network, UnsupportedModelError
from edgepriv.selective_encryption.select.scores import fisher, magnitude, random_scores

__all__ = [
    "Choice",
    "Network",
    "UnsupportedModelError",
    "choose",
    "decoy_gates",
    "fisher",
    "magnitude",
    "pss_gates",
    "random_scores",
]
