"""What an update of this fleet would have shown without protection, and what the gateway saw as configured.

The risk service's attack is run on canary devices that it plays itself, never on a device of the fleet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.federated.fixed_point import choose_ring
from edgepriv.risk.gradient_leakage.fleet_view import fleet_view, with_head
from edgepriv.risk.gradient_leakage.protections import NoProtection, WithoutStatistics
from edgepriv.wire.update import decode_update

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgepriv.demo.prepare import Prepared

    Arrays = Mapping[str, np.ndarray[Any, Any]]
PUBLIC = 300
CANARIES = 4


@dataclass(frozen=True, slots=True)
class MaskedUpload:
    """What a gateway holds of one device in a masked round: the fixed-point update plus a uniform mask of the ring."""

    clip: float
    name: str = "masked rounds (the gateway sees sums only)"

    def apply(self, update: Arrays, rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
        """Add a mask that is uniform over the ring, as the sum of pairwise masks is to anybody without a key."""
        ring = choose_ring(fraction_bits=16, bound=self.clip, max_weight=1, devices=2, slack=0)
        scale = 2.0**16
        out = {}
        for name, tensor in WithoutStatistics().apply(update, rng).items():
            fixed = np.round(np.asarray(tensor, np.float64) * scale).astype(np.int64).astype(np.uint64)
            masked = fixed + rng.integers(0, 1 << 63, tensor.shape, np.uint64)
            wide = masked.astype(np.uint32).view(np.int32) if ring.bits == 32 else masked.view(np.int64)
            out[name] = (wide / scale).astype(np.float32)
        return out

    def sigmas(self, update: Arrays) -> dict[str, float]:
        """No Gaussian noise was added; the bound does not apply to masks."""
        return dict.fromkeys(WithoutStatistics().apply(update, np.random.default_rng(0)), 0.0)


def update_views(prepared: Prepared, *, masked: bool, seed: int) -> list[Any]:
    """The two views of the report: a head-only device, and one that trains the whole BatchNorm model."""
    weights = decode_update(prepared.weights.read_bytes(), max_bytes=64 << 20).tensors
    model = with_head(prepared.backbone.body, weights["head.weight"], weights["head.bias"])
    rows = np.random.default_rng(seed).permutation(len(prepared.seen))[:PUBLIC]
    protection = [MaskedUpload(8.0)] if masked else [NoProtection()]
    return fleet_view(
        model,
        prepared.held[:CANARIES],
        prepared.held_labels[:CANARIES],
        prepared.seen[rows],
        prepared.data.labels[prepared.thirds.backbone][rows],
        head_protections=protection,
        full_protections=protection if masked else [WithoutStatistics()],
        full_batch=CANARIES,
        seed=seed,
    )
