"""Topic names: ``edgepriv/v1/<party>/up/<shard>/<lane>`` and ``edgepriv/v1/<party>/down/<lane>``.

The party is the sender (up) or the receiver (down); the broker's ACL ties it to the connection's certificate, and the
gateway checks it against the session that authenticates the payload. At most seven slashes, as the narrowest brokers
allow. Lanes up: ``epoch`` (a session or epoch record) and ``msg`` (everything else, sealed). Lane down: ``msg``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgepriv.errors import WireError

ROOT = "edgepriv/v1"
_UP = re.compile(rf"{ROOT}/((?:dev|op|risk|gateway)-[a-z0-9-]{{1,48}})/up/(\d{{1,3}})/(epoch|msg)")
_DOWN = re.compile(rf"{ROOT}/((?:dev|op|risk|gateway)-[a-z0-9-]{{1,48}})/down/(msg)")


@dataclass(frozen=True, slots=True)
class UpTopic:
    """A parsed uplink topic."""

    party: str
    shard: int
    lane: str


def up(party: str, shard: int, lane: str) -> str:
    """Topic on which ``party`` speaks to the gateway of ``shard``."""
    return f"{ROOT}/{party}/up/{shard}/{lane}"


def down(party: str) -> str:
    """Topic on which a gateway speaks to ``party``."""
    return f"{ROOT}/{party}/down/msg"


def up_filter(shard: int) -> str:
    """What the gateway of ``shard`` subscribes to."""
    return f"{ROOT}/+/up/{shard}/#"


def parse_up(topic: str) -> UpTopic:
    """Parse an uplink topic, or raise WireError."""
    match = _UP.fullmatch(topic)
    if not match:
        raise WireError("not an uplink topic")
    return UpTopic(match[1], int(match[2]), match[3])


def is_down(topic: str, party: str) -> bool:
    """Say whether ``topic`` is the downlink of ``party``."""
    match = _DOWN.fullmatch(topic)
    return bool(match) and match is not None and match[1] == party
