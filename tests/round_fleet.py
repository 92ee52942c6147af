"""A conductor and participants joined by lists instead of a broker: the real code of both ends, no network."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from edgepriv.federated.fixed_point import Ring, decode_sum, quantise
from edgepriv.federated.head import BIAS, WEIGHT, HeadTrainer, new_head
from edgepriv.federated.local_update import LocalUpdate
from edgepriv.federated.participant import EndRound, FetchModel, Participant, RoundPolicy, Send, Upload
from edgepriv.keys import Identity
from edgepriv.wire.messages import Ack, Offer
from edgepriv.wire.trust import TrustList
from edgepriv.wire.update import decode_update, encode_update
from gateway.conductor import Conductor
from gateway.round_plan import RoundPlan
from gateway.round_ports import DropUpload, OpenUpload, Tell


class MemoryStore:
    """Rounds in a dict: what a crash keeps."""

    def __init__(self):
        self.saved, self.closed = {}, []

    def save(self, number, raw, part=""):
        self.saved[number, part] = raw
        if not raw:
            del self.saved[number, part]

    def load(self):
        return [raw for _, raw in sorted(self.saved.items())]

    def close(self, record):
        self.saved = {key: raw for key, raw in self.saved.items() if key[0] != record.round}
        if all(r.round != record.round for r in self.closed):
            self.closed.append(record)

    def records(self):
        return [dataclasses.asdict(r) for r in self.closed]

    def record(self, number):
        return next((dataclasses.asdict(r) for r in self.closed if r.round == number), {})

    def last(self):
        return dataclasses.asdict(self.closed[-1]) if self.closed else {}


class Fleet:
    """``lost(kind, device)`` may return True to lose a message; ``gone`` names devices that say nothing any more."""

    def __init__(self, folder: Path, trainers, *, policy=None, lost=None, first=0):
        self.folder = Path(folder)
        numbers = range(first, first + len(trainers))
        identities = {f"dev-{i:03d}": Identity.new("device", f"{i:03d}") for i in numbers}
        self.trust = TrustList(1, 0, 1 << 40, tuple(i.public for i in identities.values()))
        policy = policy or RoundPolicy(trainable=("*",), min_cohort=2)
        self.devices = {
            name: Participant(identity, self.trust, policy, trainer, seed=k)
            for k, ((name, identity), trainer) in enumerate(zip(identities.items(), trainers, strict=True))
        }
        self.store = MemoryStore()
        self.conductor = Conductor(self.folder / "gateway", self.store, self.trust)
        self.older = {}  # updates of an earlier round that a device still offers
        self.uploads, self.acks, self.gone, self.now = {}, [], set(), 1000.0
        self.lost = lost or (lambda kind, device: False)
        self.transcript = []
        self.hold = set()  # devices whose upload never completes
        self.inbox = []
        self.tamper, self.sent = {}, {}

    def plan(self, weights, **kwargs) -> RoundPlan:
        raw = encode_update(weights, {"model": "m"})
        base = self.conductor.add_model(raw)
        rows = tuple([name, list(value.shape)] for name, value in weights.items())
        defaults = {"round": 1, "model": "m", "min_cohort": 2, "clip": 100.0, "fraction_bits": 10}
        return RoundPlan(**{**defaults, "base": base, "base_bytes": len(raw), "tensors": rows, **kwargs})

    def open(self, plan):
        self._gateway(self.conductor.open_round(plan, list(self.devices), self.now))

    def restart(self):
        """SIGKILL of the gateway: a new conductor over what is durable."""
        self.conductor = Conductor(self.folder / "gateway", self.store, self.trust)
        staged = {bytes.fromhex(p.name): p for p in self.folder.glob("?" * 64)}
        self._gateway(self.conductor.resume(self.now, staged))

    def run(self, *, seconds=400, step=1.0):
        """Step both ends until no round is running; returns the last record."""
        end = self.now + seconds
        while self.now < end and any(r.record is None for r in self.conductor.rounds.values()):
            self.turn(step)
        return self.store.closed[-1] if self.store.closed else None

    def turn(self, step=1.0):
        self.now += step
        self._gateway(self.conductor.tick(self.now))
        waiting, self.inbox = self.inbox, []
        for device, message in waiting:
            self._device(device, message)
        for name, upload in [*self.older.items(), *self.uploads.items()]:
            if name not in self.gone and not self.lost("offer", name):
                self._offer(name, upload)

    def _offer(self, name, upload):
        digest = hashlib.sha256(upload.payload).digest()
        offer = Offer(
            digest[:16], "update", len(upload.payload), 65536, digest, upload.round, upload.expires, upload.meta
        )
        self._gateway(self.conductor.on_offer(name, offer, self.now))

    def _gateway(self, outgoing):
        for item in outgoing:
            match item:
                case Tell(device, message):
                    if not self.lost("down", device):
                        self.inbox.append((device, message))
                case OpenUpload(device, digest, _size):
                    self._transfer(device, digest)
                case DropUpload(_device, digest):
                    (self.folder / digest.hex()).unlink(missing_ok=True)

    def _transfer(self, device, digest):
        both = [kept[device] for kept in (self.uploads, self.older) if device in kept]
        upload = next((u for u in both if hashlib.sha256(u.payload).digest() == digest), None)
        held = upload is None or (device in self.hold and upload is self.uploads.get(device))
        if held or device in self.gone or self.lost("chunks", device):
            return
        path = self.folder / digest.hex()
        path.write_bytes(upload.payload)
        self.transcript.append((device, upload.payload))
        self._gateway(self.conductor.on_complete(device, digest, path, self.now))

    def _device(self, device, message):
        participant = self.devices[device]
        if device in self.gone:
            return
        if isinstance(message, Ack):
            self.acks.append((device, message))
            for kept in (self.uploads, self.older):
                if device in kept and hashlib.sha256(kept[device].payload).digest() == message.digest:
                    del kept[device]
            return
        self._act(device, participant.receive(message, self.now))

    def _act(self, device, actions):
        participant = self.devices[device]
        for action in actions:
            match action:
                case Send(message):
                    self.transcript.append((device, message))
                    if not self.lost("up", device):
                        self._gateway(self.conductor.on_message(device, message, self.now))
                case FetchModel(number, digest, _size):
                    raw = self.conductor.model_path(digest).read_bytes()
                    self._act(device, participant.model_ready(number, raw))
                case Upload():
                    if kept := self.uploads.get(device):
                        self.older[device] = kept
                    change = self.tamper.get(device, lambda payload: payload)
                    self.uploads[device] = dataclasses.replace(action, payload=change(action.payload))
                    self.sent[device] = self.uploads[device]
                case EndRound(_number, drop=drop):
                    for kept in (self.uploads, self.older):
                        if device in kept and kept[device].round in drop and device not in self.hold:
                            del kept[device]

    def base_of(self, opened):
        return decode_update(self.conductor.model_path(opened.base).read_bytes(), max_bytes=1 << 30).tensors

    def weights(self, record):
        return decode_update(self.conductor.model_path(record.after).read_bytes(), max_bytes=1 << 30).tensors


def fixed_trainer(delta, examples):
    """A trainer that always answers the same."""
    return lambda weights, settings: LocalUpdate({n: np.asarray(v, np.float32) for n, v in delta.items()}, examples)


__all__ = ["BIAS", "WEIGHT", "Fleet", "HeadTrainer", "MemoryStore", "fixed_trainer", "new_head"]


def weighted_fleet(folder, n, size, rng, **kwargs):
    """Devices with random updates [size] and weights 1 to 4 in turn; returns the fleet and the updates."""
    deltas = [rng.standard_normal(size).astype(np.float32) for _ in range(n)]
    return Fleet(folder, [fixed_trainer({"w": d}, 1 + i % 4) for i, d in enumerate(deltas)], **kwargs), deltas


def weighted_mean(deltas, names):
    """What a round over exactly these devices of a `weighted_fleet` must give, bit for bit."""
    ring = Ring(64, 10, 100.0, 4, 500)
    total, weight = np.zeros(len(deltas[0]), np.uint64), 0
    for name in names:
        i = int(name.removeprefix("dev-"))
        total += quantise(deltas[i], 1 + i % 4, ring)
        weight += 1 + i % 4
    return (decode_sum(total, ring).astype(np.float32).astype(np.float64) / weight).astype(np.float32)
