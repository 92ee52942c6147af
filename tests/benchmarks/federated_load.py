"""The load of the federated benchmark: N devices in one process, each with the real participant and sealed link.

What a device sends is random and its own; it is made when it is due, masked, written to a file and sent from there
chunk by chunk as the gateway grants. No frames, no inference: this is the generator, its cost is reported apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from edgepriv import keys
from edgepriv.errors import EdgeprivError
from edgepriv.federated.local_update import LocalUpdate
from edgepriv.federated.participant import EndRound, FetchModel, Participant, RoundPolicy, Send, Upload
from edgepriv.mqtt import open_link
from edgepriv.wire import messages, topics
from edgepriv.wire.link import epoch_of
from edgepriv.wire.messages import Ack, Chunk, Fetch, Grant, Offer, RoundMessage
from edgepriv.wire.session import open_session
from edgepriv.wire.transfer import Download, chunk_bytes_for, chunk_count, from_ranges
from edgepriv.wire.trust import read_trust

WEIGHT = 10
LAYERS = 20


def delta_of(index: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The update of device ``index``: float32, random, of norm about a half."""
    rng = np.random.default_rng(1000 + index)
    size = sum(int(np.prod(s)) for s in shapes.values())
    return {n: rng.standard_normal(s, np.float32) * np.float32(0.5 / np.sqrt(size)) for n, s in shapes.items()}


class LoadDevice:
    """One device on a shared connection."""

    def __init__(self, index, name, site, trust, link, folder, min_cohort, gateway="gateway-site", shard=0):
        self.index, self.name, self.link, self.folder = index, name, link, folder
        self.identity = keys.load_identity(site / "keys" / f"{name}.key")
        policy = RoundPolicy(trainable=("*",), min_cohort=min_cohort)
        self.participant = Participant(self.identity, trust, policy, self._train)
        self.signed, self.session = open_session(self.identity, trust, gateway, seq=1, now=time.time())
        self.shard = shard
        self.topic, self.known, self.announced = topics.up(name, shard, "msg"), False, -99.0
        self.stays = False
        self.out, self.download, self.fetching, self.upload, self.result = [], None, None, None, None
        link.subscribe(topics.down(name))

    def _train(self, weights, _settings):
        return LocalUpdate(delta_of(self.index, {n: v.shape for n, v in weights.items()}), WEIGHT)

    # --- down ---------------------------------------------------------------------------------------------

    def handle(self, packet, now):
        if epoch_of(packet.payload) != self.session.epoch_id:
            return
        try:
            self._dispatch(messages.decode(self.session.open(packet.topic, packet.payload)), now)
        except EdgeprivError as error:
            print(f"{self.name}: {error}", file=sys.stderr)

    def _dispatch(self, body, now):
        match body:
            case Ack(digest) if digest == self.signed.digest:
                self.known = True
                self.out.append(messages.Status(now, "load", "m", bytes(32), 0, 1, {}))
            case Ack(digest) if self.upload and digest == self.upload["digest"]:
                self.upload["path"].unlink(missing_ok=True)
                self.upload = None
            case Grant(ref, ranges) if self.upload and ref == self.upload["digest"][:16]:
                waiting = set(self.upload["granted"])
                wanted = from_ranges(ranges, chunk_count(self.upload["size"], self.upload["chunk"]))
                self.upload["granted"] += [i for i in wanted if i not in waiting]
                self.upload["offered"] = now
            case Chunk(_, index, data) if self.download:
                if self.download.accept(index, len(data)):
                    at = index * self.chunk
                    self.buffer[at : at + len(data)] = data
            case RoundMessage():
                self._act(self.participant.receive(body, now), now)

    def _act(self, actions, now):
        for action in actions:
            match action:
                case Send(message):
                    self.out.append(message)
                case FetchModel():
                    self.chunk = chunk_bytes_for(self.link.max_packet_bytes)
                    self.fetching, self.buffer = action, bytearray(action.size)
                    self.download = Download(action.size, self.chunk)
                case Upload(number, payload, meta, expires):
                    path = self.folder / f"{self.name}.update"
                    path.write_bytes(payload)
                    self.upload = {
                        "path": path, "size": len(payload), "digest": hashlib.sha256(payload).digest(), "round": number,
                        "meta": meta, "expires": expires, "granted": [], "offered": -99.0,
                        "chunk": chunk_bytes_for(self.link.max_packet_bytes),
                    }  # fmt: skip
                case EndRound(number, reason, adopt):
                    self.result = {"device": self.name, "round": number, "reason": reason, "adopt": adopt.hex()}
                    if self.stays:
                        print(json.dumps(self.result), flush=True)

    # --- up -----------------------------------------------------------------------------------------------

    def step(self, now):
        """Send what may be sent; True when something was."""
        if not self.known:
            if now - self.announced > 5 and self.link.send(topics.up(self.name, self.shard, "epoch"), self.signed.raw):
                self.announced = now
            return False
        before = len(self.out)
        if self.download:
            for first, count in self.download.wants(now):
                self.out.append(Fetch(self.fetching.digest[:16], first, count, self.chunk))
            if self.download.complete:
                self._fetched(now)
        while self.out and self._send(self.out[0]):
            self.out.pop(0)
        return self._send_upload(now) or before != len(self.out)

    def _fetched(self, now):
        raw, self.buffer, self.download = self.buffer, None, None
        if hashlib.sha256(raw).digest() != self.fetching.digest:
            raise SystemExit("the downloaded weights are damaged")
        self._act(self.participant.model_ready(self.fetching.round, raw), now)

    def _send_upload(self, now):
        up, sent = self.upload, False
        if not up:
            return False
        if now - up["offered"] > 10 and not up["granted"]:
            meta = Offer(
                up["digest"][:16],
                "update",
                up["size"],
                up["chunk"],
                up["digest"],
                up["round"],
                up["expires"],
                up["meta"],
            )
            if self._send(meta):
                up["offered"] = now
        if up["granted"]:
            with up["path"].open("rb", buffering=0) as file:
                while up["granted"]:
                    file.seek(up["granted"][0] * up["chunk"])
                    if not self._send(Chunk(up["digest"][:16], up["granted"][0], file.read(up["chunk"]))):
                        break
                    up["granted"].pop(0)
                    sent = True
        return sent

    def _send(self, message):
        return self.link.send(self.topic, self.session.seal(self.topic, messages.encode(message)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("site", "folder", "broker", "names"):
        parser.add_argument(name)
    parser.add_argument("--min-cohort", type=int, default=2)
    parser.add_argument("--gateway", default="gateway-site")
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument(
        "--stay", action="store_true", help="stay for more rounds, until killed; a line for each result"
    )
    args = parser.parse_args()
    site, folder, names = Path(args.site), Path(args.folder), args.names.split(",")
    folder.mkdir(parents=True, exist_ok=True)
    owner = keys.load_public(site / "keys" / "owner.key.pub")
    trust = read_trust((site / "trust.cbor").read_bytes(), owner.ed25519, now=time.time())
    count = min(16, len(names))
    links = [open_link(args.broker, f"{names[0]}-{i}", inflight=64, inbox=4000) for i in range(count)]
    devices = {
        n: LoadDevice(
            int(n.removeprefix("dev-")),
            n,
            site,
            trust,
            links[i % count],
            folder,
            args.min_cohort,
            args.gateway,
            args.shard,
        )
        for i, n in enumerate(names)
    }
    for link in links:
        link.wait(30)
    for device in devices.values():
        device.stays = args.stay
    while args.stay or not all(d.result for d in devices.values()):
        now, worked = time.time(), False
        for link in links:
            for packet in link.receive(256):
                devices[packet.topic.split("/")[2]].handle(packet, now)
                worked = True
        for device in devices.values():
            worked |= bool(device.step(now))
        if not worked:
            time.sleep(0.004)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"results": {n: d.result for n, d in devices.items()}, "cpu_s": usage.ru_utime + usage.ru_stime}))
    sys.stdout.flush()
    os._exit(0)  # sixteen network threads need no farewell


if __name__ == "__main__":
    main()
