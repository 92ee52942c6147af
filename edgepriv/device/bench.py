"""How much the runtime costs beside a bare loop: the same capture and resize, the same threads, model and AEAD only.

Both loops run in turns in one process, so that a noisy machine disturbs both; the ratio is the median over the turns.
The runtime is the real one with a spool on a real disk; only the link is away, so nothing is published.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import primitives
from edgepriv.device.config import (
    DeviceConfig,
    IdentityConfig,
    ModelConfig,
    ReleaseConfig,
    RoundsConfig,
    RunConfig,
    SealConfig,
    SpoolConfig,
)
from edgepriv.device.infer import Inferer
from edgepriv.device.loop import OfflineLink
from edgepriv.device.release import release
from edgepriv.device.seal import ModelLabel
from edgepriv.device.start import assemble
from edgepriv.mqtt import BrokerSettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgepriv.device.capture import Frame
    from edgepriv.device.runtime import DeviceRuntime

SPOOL_MB = 64.0
TURNS = 9


class Repeated:
    """A source that gives the same captured frames again and again, so that capture costs both loops the same."""

    def __init__(self, frames: list[Frame]) -> None:
        self._frames, self._next, self.exhausted = frames, 0, False

    def read(self) -> Frame:
        """See FrameSource."""
        frame = self._frames[self._next % len(self._frames)]
        self._next += 1
        return replace(frame, index=self._next)

    def close(self) -> None:
        """See FrameSource."""


@dataclass(frozen=True, slots=True)
class LocalResult:
    """Frames per second of the runtime and of the bare loop, and milliseconds a frame of each stage."""

    fps: float
    bare_fps: float
    ratio: float
    stages_ms: dict[str, float]


def bench_config(site: Path, model: Path, *, gateway: str, device: str, threads: int) -> DeviceConfig:
    """A device's configuration on a site made for the measurement."""
    return DeviceConfig(
        device=IdentityConfig(
            site / "keys" / f"{device}.key",
            site / "trust.cbor",
            site / "keys" / "owner.key.pub",
            gateway,
            site / "bench",
        ),
        broker=BrokerSettings("mqtt://127.0.0.1:1"),
        model=ModelConfig(model, threads=threads),
        source={"kind": "directory", "path": str(site)},
        release=ReleaseConfig(),
        seal=SealConfig(),
        spool=SpoolConfig(max_mb=SPOOL_MB),
        rounds=RoundsConfig(take_part=False),
        run=RunConfig(),
    )


def measure(
    config: DeviceConfig, frames: list[Frame], *, frames_per_turn: int, folder: Path, inferer: Inferer | None = None
) -> LocalResult:
    """Run both loops in turns; ``inferer``: in place of the plain file that ``[model]`` names."""
    inferer = inferer or Inferer.from_file(config.model.path, threads=config.model.threads)
    runtime = _runtime(config, inferer, folder)
    runtime.stages.source = Repeated(frames)
    ours, bare = _stepper(runtime), _bare_loop(inferer, Repeated(frames), frames[0].pixels.nbytes)
    _timed(ours, int(SPOOL_MB * 1e6 / frames[0].pixels.nbytes) + frames_per_turn)  # until the spool's space is reused
    _timed(bare, frames_per_turn)
    times = [(_timed(ours, frames_per_turn), _timed(bare, frames_per_turn)) for _ in range(TURNS)]
    stages = _stage_times(runtime, frames, frames_per_turn)
    runtime.finish()
    return LocalResult(
        fps=1 / statistics.median(t for t, _ in times),
        bare_fps=1 / statistics.median(t for _, t in times),
        ratio=statistics.median(b / o for o, b in times),
        stages_ms=stages,
    )


def _runtime(config: DeviceConfig, inferer: Inferer, folder: Path) -> DeviceRuntime:
    from PIL import Image

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "first.png")  # the source is replaced below
    return assemble(config, folder=folder, clock=time.time, link=OfflineLink(), inferer=inferer)


def _stepper(runtime: DeviceRuntime) -> Callable[[], None]:
    def one() -> None:
        runtime.step()

    return one


def _bare_loop(inferer: Inferer, source: Repeated, size: int) -> Callable[[], None]:
    """Capture, resize, model, AEAD: what no secure device can do without."""
    backend, key, out = primitives.backend(), primitives.random_bytes(32), bytearray(size + primitives.TAG_BYTES)
    counter = iter(range(1 << 62))

    def one() -> None:
        frame = source.read()
        inferer.run(inferer.prepare(frame))
        nonce = next(counter).to_bytes(12, "big")
        backend.seal_into(primitives.AES_GCM, key, nonce, frame.pixels.reshape(-1).data, b"", out)

    return one


def _timed(loop: Callable[[], None], n: int) -> float:
    """Seconds a frame."""
    begun = time.perf_counter()
    for _ in range(n):
        loop()
    return (time.perf_counter() - begun) / n


def _stage_times(runtime: DeviceRuntime, frames: list[Frame], n: int) -> dict[str, float]:
    """Milliseconds a frame of each stage, one after the other, as a step calls them."""
    stages = runtime.stages
    totals: dict[str, float] = dict.fromkeys(("capture", "infer", "release", "seal", "spool"), 0.0)
    source = Repeated(frames)
    label = ModelLabel(stages.inferer.spec.id, stages.inferer.digest)

    def clocked(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.perf_counter()
        value = call(*arguments)
        totals[name] += time.perf_counter() - begun
        return value

    for i in range(n):
        frame = clocked("capture", source.read)
        inference = clocked("infer", stages.inferer, frame)
        released = clocked("release", release, stages.policy, inference)
        items = clocked("seal", stages.sealer.seal, released, label, b"")
        clocked("spool", stages.spool.add, items)
        if i % runtime.config.spool.commit_frames == 0:
            clocked("spool", stages.spool.commit)
    return {name: round(total / n * 1e3, 3) for name, total in totals.items()}
