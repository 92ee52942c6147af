"""From a configuration file to a runtime: the one place where the stages are put together for a real device."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgepriv import keys, mqtt
from edgepriv.device import protected
from edgepriv.device.capture import open_source
from edgepriv.device.config import load_config
from edgepriv.device.fetch import Fetcher
from edgepriv.device.indicator import OutputIndicator
from edgepriv.device.learn import Learner
from edgepriv.device.model_keeper import ModelKeeper
from edgepriv.device.model_updates import ModelUpdates, ProcessInstaller
from edgepriv.device.publish import Publisher
from edgepriv.device.purify import OutputPurifier, PurifiedPolicy
from edgepriv.device.release import parse_policy
from edgepriv.device.runtime import DeviceRuntime, Stages
from edgepriv.device.seal import Sealer
from edgepriv.device.spool import Spool
from edgepriv.device.trust_updates import TrustUpdates
from edgepriv.errors import ConfigError, TrustError
from edgepriv.trust_file import TrustFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from edgepriv.device.config import DeviceConfig, ReleaseConfig
    from edgepriv.device.infer import Inferer
    from edgepriv.device.ledger import SceneLedger
    from edgepriv.device.release import ReleasePolicy
    from edgepriv.mqtt import Link
    from edgepriv.wire.trust import TrustList

log = logging.getLogger(__name__)
MAX_MODEL_BYTES = 512 << 20


def broker_link(config: mqtt.BrokerSettings, name: str) -> Link:
    """Open the connection that ``[broker]`` describes."""
    return mqtt.open_link(
        config.url, name, tls=config.tls, username=config.username, password_file=config.password_file, inflight=64
    )


def start_device(path: Path, *, clock: Callable[[], float] = time.time, link: Link | None = None) -> DeviceRuntime:
    """Build the runtime of a configuration file; ``link`` replaces the broker's (the simulator's faulty one).

    Raises:
        EdgeprivError: of the kind that names what is missing or wrong.
    """
    config = load_config(path)
    return assemble(config, folder=path.resolve().parent, clock=clock, link=link, file=path.resolve())


def assemble(
    config: DeviceConfig,
    *,
    folder: Path,
    clock: Callable[[], float],
    link: Link | None = None,
    inferer: Inferer | None = None,
    file: Path | None = None,
    monotonic: Callable[[], float] = time.monotonic,
) -> DeviceRuntime:
    """Put the stages of one device together.

    Args:
        config: the configuration.
        folder: what its relative paths count from.
        clock: Unix seconds.
        link: in place of the broker's.
        inferer: shared by the devices of one process; then nothing watches over its permission.
        file: the configuration's own file, for the process that installs models.
        monotonic: what the time floor is advanced by.
    """
    identity, trust = _identity(config, clock)
    state = config.device.state
    policy = open_policy(config.release)
    keeper = None
    if inferer is None:
        accept = partial(_check_release, policy, config.release)
        keeper = ModelKeeper(config, identity, trust.current, accept, monotonic=monotonic)
        inferer = keeper.inferer
    _check_release(policy, config.release, inferer)
    source = open_source(str(config.source.get("kind", "")), _options(config.source), folder=folder, clock=clock)
    max_bytes = int(config.spool.max_mb * 1e6)
    spool = Spool(state / "spool", max_bytes=max_bytes, max_rows=config.spool.max_rows, drop=config.spool.drop)
    link = link or broker_link(config.broker, identity.name)
    sealer = _sealer(config, identity, trust, spool, clock)
    metas: dict[int, dict[str, Any] | None] = {}
    publisher = Publisher(
        spool,
        link,
        lambda: sealer.session,
        party=identity.name,
        shard=config.device.shard,
        meta=lambda n: metas.get(n, {}),
    )
    fetcher = Fetcher(state / "objects", link, publisher.send_message, max_bytes=MAX_MODEL_BYTES)
    stages = Stages(
        source, inferer, policy, _ledger(config, state), sealer, spool, publisher, fetcher, learner=None, link=link
    )
    if config.release.indicator is not None:
        stages.indicator = OutputIndicator.load(config.release.indicator)
    runtime = DeviceRuntime(identity.name, config, stages, clock=clock)
    if config.rounds.take_part and (inferer.spec.features or inferer.spec.trainable):
        stages.learner = _learner(config, identity, trust.current(), runtime, metas)
    stages.keeper = keeper
    if keeper is not None and config.model.follow:
        keeper.updates = _model_updates(config, identity, trust, stages, file)
    stages.trust = TrustUpdates(trust, fetcher, lambda adopted: _tell_learner(stages, adopted))
    return runtime


def _sealer(
    config: DeviceConfig, identity: keys.Identity, trust: TrustFile, spool: Spool, clock: Callable[[], float]
) -> Sealer:
    return Sealer(
        identity,
        trust.current,
        config.device.gateway,
        config.seal,
        shard=config.device.shard,
        clock=clock,
        next_epoch=lambda: spool.next_value("epoch_seq"),
    )


def open_policy(config: ReleaseConfig) -> ReleasePolicy:
    """Return the configured release policy, behind the purifier where one is named."""
    policy = parse_policy(config.policy)
    return policy if config.purifier is None else PurifiedPolicy(policy, OutputPurifier.load(config.purifier))


def _check_release(policy: ReleasePolicy, config: ReleaseConfig, inferer: Inferer) -> None:
    """Whether a model fits the policy, and the policy's bound on one of its inferences the configured limits."""
    if policy.task != inferer.spec.task:
        raise ConfigError(
            f"release policy {policy.name!r} is for {policy.task}, but model {inferer.spec.id} does {inferer.spec.task}"
        )
    limits = {name: getattr(config, name) for name in ("max_bits_per_inference", "bits_per_scene")}
    if not any(limits.values()):
        return
    bits = policy.bits(_released_size(inferer))
    for name, limit in limits.items():
        if 0 < limit < bits - 1e-9:
            raise ConfigError(
                f"{policy.name} of model {inferer.spec.id} releases up to {bits:.1f} bits an inference,"
                f" [release] {name} is {limit:g}",
                hint="choose a policy that says less, or raise the limit",
            )


def _released_size(inferer: Inferer) -> int:
    """What a policy's bits are counted from: a detector's labels, else the number of values of the model's output."""
    spec = inferer.spec
    if spec.task == "detect":
        return len(spec.labels)
    channels = 1 if spec.colour == "gray" else 3
    size = (channels, spec.height, spec.width) if spec.layout == "NCHW" else (spec.height, spec.width, channels)
    return max(1, inferer.run(np.zeros((1, *size), np.float32))[0].size)


def _model_updates(
    config: DeviceConfig, identity: keys.Identity, trust: TrustFile, stages: Stages, file: Path | None
) -> ModelUpdates:
    """Follow a model id at the gateway; new versions go into the store that ``[model] path`` names."""
    if file is None or not protected.is_store(config.model.path):
        hint = "install the first version by hand: edgepriv model pull; path is [device] state + /models"
        raise ConfigError("[model] follow needs a model store as [model] path", hint=hint)

    def send(message: Any) -> bool:
        publisher = stages.publisher
        return publisher.epoch_known(stages.sealer.epoch_digest) and publisher.send_message(message)

    return ModelUpdates(
        config.model.follow,
        lambda: protected.configured_store(config, identity, trust.current()),
        stages.fetcher,
        send,
        ProcessInstaller(file),
        every_s=config.model.check_s,
    )


def _tell_learner(stages: Stages, adopted: TrustList) -> None:
    """The next round checks its cohort against the new list; a running one goes on with the list it began with."""
    if stages.learner is not None:
        stages.learner.participant.trust = adopted


def _identity(config: DeviceConfig, clock: Callable[[], float]) -> tuple[keys.Identity, TrustFile]:
    """The device's keys and the trust list that names them."""
    identity = keys.load_identity(config.device.key)
    if identity.public.role != "device":
        raise ConfigError(f"{config.device.key} is the key of {identity.name}, not of a device")
    config.device.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    trust = TrustFile(config.device.trust, config.device.owner, config.device.state / "trust-version", clock=clock)
    if trust.current().party(identity.name, "device") != identity.public:
        raise TrustError(f"{identity.name} is listed with other keys", hint="the owner signs this device's .pub file")
    return identity, trust


def _learner(
    config: DeviceConfig,
    identity: keys.Identity,
    trust: TrustList,
    runtime: DeviceRuntime,
    metas: dict[int, dict[str, Any] | None],
) -> Learner:
    return Learner(
        identity,
        trust,
        config.rounds,
        state=config.device.state,
        fetcher=runtime.stages.fetcher,
        send=runtime.stages.publisher.send_message,
        spool_upload=runtime.spool_upload,
        drop_upload=runtime.drop_upload,
        model=runtime.stages.inferer.digest,
        trainable=runtime.stages.inferer.spec.trainable,
        metas=metas,
        check=config.self_check,
    )


def _options(source: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key != "kind"}


def _ledger(config: DeviceConfig, state: Path) -> SceneLedger | None:
    if config.release.bits_per_scene <= 0:
        log.warning("no [release] bits_per_scene: what is said of one scene adds up without a bound")
        return None
    from edgepriv.device.ledger import SceneLedger

    return SceneLedger(
        state / "ledger.db", bits_per_scene=config.release.bits_per_scene, window_s=config.release.scene_window_s
    )
