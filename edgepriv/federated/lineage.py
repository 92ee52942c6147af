"""Which models a set of global weights was trained over, stated in the weights' own meta map.

``over``: SHA-256 of every model (the exact bytes that run, one for each level) whose features the weights are for. It
travels with the weights, and the aggregator hands it on to the weights that a round makes of them. Weights without it
are for whatever model runs, as far as anybody can tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepriv.errors import WireError
from edgepriv.wire.update import encode_header, split_update

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OVER = "over"
MAX_MODELS = 64


def named_models(meta: Mapping[str, Any]) -> tuple[bytes, ...]:
    """The models that weights are for; empty where they do not say (WireError: malformed)."""
    named = meta.get(OVER, [])
    if not isinstance(named, list) or len(named) > MAX_MODELS:
        raise WireError("the weights' list of models is malformed")
    if not all(isinstance(digest, bytes) and len(digest) == 32 for digest in named):
        raise WireError("the weights name a model that is no SHA-256")
    return tuple(named)


def name_models(raw: bytes, models: Sequence[bytes]) -> bytes:
    """The same weights, naming the models that they are for (WireError: no weights, or no digests)."""
    header, data = split_update(raw, max_bytes=len(raw))
    meta = {**header["meta"], OVER: list(models)}
    named_models(meta)
    return encode_header(meta, header["tensors"]) + bytes(data)
