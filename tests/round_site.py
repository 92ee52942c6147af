"""Rounds through a whole gateway, step by step: what tests of the daemon share."""

from __future__ import annotations

import numpy as np
from gateway_site import exchange

from edgepriv.errors import TemporaryError
from edgepriv.wire.update import encode_update

SIZE = 5000


class Fails:
    """A database whose ``COMMIT`` fails on demand, and which then stays away for some statements."""

    def __init__(self, database):
        self.database, self.when, self.away, self.tried = database, None, 0, 0
        self.execute, self.query = self._guarded(database.execute), self._guarded(database.query)
        database.execute, database.query = self.execute, self.query

    def _guarded(self, run):
        def guarded(sql, params=()):
            if self.when and sql == "COMMIT" and self.when():
                self.when, self.away = None, 5
                raise TemporaryError("away")
            if self.away:
                self.away, self.tried = self.away - 1, self.tried + 1
                raise TemporaryError("still away")
            return run(sql, params)

        return guarded


def opened(site, gateway, devices):
    """A round over both devices, from the weights to its announcement."""
    for device in devices:
        exchange(gateway, device, device.record())
    site.now += 1
    gateway.step()
    gateway.rounds.set_weights(site.weights, "m")
    number = gateway.rounds.start({}, site.now)
    gateway._release_replies()
    turn(gateway, devices)
    return number


def turn(gateway, devices, *packets):
    """One step of the gateway and what the devices answer."""
    gateway.link.inbox += packets
    gateway.step()
    down, gateway.link.sent = gateway.link.sent, []
    for device in devices:
        gateway.link.inbox += device.take(down)


def update(device, value, number, examples=1):
    raw = encode_update({"w": np.full(SIZE, value, np.float32)})
    return raw, device.offer(raw, "update", number, 1024, meta={"examples": examples})


def finish(site, gateway, devices, offers, turns=200):
    """Repeat offers until all are acknowledged and the round has ended."""
    for _ in range(turns):
        again = [d.seal(o) for d, o in zip(devices, offers, strict=True) if o.digest not in d.acks]
        turn(gateway, devices, *again)
        site.now += 0.6
        ended = gateway.store.database.query("SELECT state FROM rounds WHERE snapshot IS NULL")
        if ended and all(o.digest in d.acks for d, o in zip(devices, offers, strict=True)):
            return gateway.rounds.table.records()[-1]
    raise AssertionError("the round did not end")
