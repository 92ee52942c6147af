"""How much the runtime costs beside a bare loop: the same capture and resize, the same threads, model and AEAD only.

Both loops run in turns in one process, so that a noisy machine disturbs both; the ratio is the median over the turns.
The runtime is the real one with a spool on a real disk; only the link is away, so nothing is published. The bare loop's
AEAD is the one that the CPU does best, as the runtime's is. Stages are clocked inside the runtime's own steps, so that
their shares and the rest (link, status, counters) add up to the step. Captured frames come from memory
in both loops: the share of capture is not a camera's.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
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
from edgepriv.device.start import assemble
from edgepriv.mqtt import BrokerSettings
from edgepriv.primitives import cpu

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
    """Frames per second of the runtime and of the bare loop, and milliseconds a frame of each stage and of a step."""

    fps: float
    bare_fps: float
    ratio: float
    stages_ms: dict[str, float]
    step_ms: float

    @property
    def shares(self) -> dict[str, float]:
        """What part of a step each stage takes, and ``rest``: what belongs to none."""
        shares = {name: ms / self.step_ms for name, ms in self.stages_ms.items()}
        return {**shares, "rest": max(0.0, 1.0 - sum(shares.values()))}

    @property
    def bottleneck(self) -> str:
        """The stage that takes most of a step."""
        return max(self.stages_ms, key=lambda name: self.stages_ms[name])


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
    largest = max(frame.pixels.nbytes for frame in frames)
    ours, bare = _stepper(runtime), _bare_loop(inferer, Repeated(frames), largest)
    _timed(ours, int(SPOOL_MB * 1e6 / largest) + frames_per_turn)  # until the spool's space is reused
    _timed(bare, frames_per_turn)
    times = [(_timed(ours, frames_per_turn), _timed(bare, frames_per_turn)) for _ in range(TURNS)]
    stages, step_ms = _stage_times(runtime, 2 * frames_per_turn)
    runtime.finish()
    return LocalResult(
        fps=1 / statistics.median(t for t, _ in times),
        bare_fps=1 / statistics.median(t for _, t in times),
        ratio=statistics.median(b / o for o, b in times),
        stages_ms=stages,
        step_ms=step_ms,
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
    backend, key, alg = primitives.backend(), primitives.random_bytes(32), cpu.choose_alg()
    out = memoryview(bytearray(size + primitives.TAG_BYTES))
    counter = iter(range(1 << 62))

    def one() -> None:
        frame = source.read()
        inferer.run(inferer.prepare(frame))
        nonce = next(counter).to_bytes(12, "big")
        flat = frame.pixels.reshape(-1).view(np.uint8)
        backend.seal_into(alg, key, nonce, flat.data, b"", out[: flat.size + primitives.TAG_BYTES])

    return one


def _timed(loop: Callable[[], None], n: int) -> float:
    """Seconds a frame."""
    begun = time.perf_counter()
    for _ in range(n):
        loop()
    return (time.perf_counter() - begun) / n


class _Watched:
    """A stage in the runtime whose calls are clocked; all else is the stage's own."""

    def __init__(self, stage: Any, calls: tuple[str, ...], name: str, spent: dict[str, float]) -> None:
        self._stage, self._calls, self._name, self._spent = stage, calls, name, spent

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._stage, name)
        return partial(self._clocked, value) if name in self._calls else value

    def __call__(self, *arguments: Any) -> Any:
        return self._clocked(self._stage, *arguments)

    def _clocked(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return call(*arguments, **named)
        finally:
            self._spent[self._name] += time.perf_counter() - begun


def _stage_times(runtime: DeviceRuntime, n: int) -> tuple[dict[str, float], float]:
    """Milliseconds a frame of each stage and of the whole step, while the runtime itself steps."""
    stages: Any = runtime.stages
    spent: dict[str, float] = dict.fromkeys(("capture", "infer", "release", "seal", "spool"), 0.0)
    stages.source = _Watched(stages.source, ("read",), "capture", spent)
    stages.inferer = _Watched(stages.inferer, (), "infer", spent)
    stages.policy = _Watched(stages.policy, ("bits", "release"), "release", spent)
    stages.sealer = _Watched(stages.sealer, ("seal", "renew"), "seal", spent)
    stages.spool = _Watched(stages.spool, ("add", "commit", "drop_finished_epochs"), "spool", spent)
    step_ms = _timed(_stepper(runtime), n) * 1e3
    return {name: round(seconds / n * 1e3, 3) for name, seconds in spent.items()}, round(step_ms, 3)
