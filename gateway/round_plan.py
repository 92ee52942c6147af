"""What an operator wants of a federated round, checked, and the announcement that devices see of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgepriv.errors import ConfigError
from edgepriv.federated.fixed_point import choose_ring, slack_of, value_bound
from edgepriv.wire.rounds import CLEAR, MASKED, RoundOpen

STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")
RULES = ("mean", "trimmed", "median", "fltrust")


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """What the operator wants of a round; times are durations in seconds.

    ``base``/``base_bytes``: digest and length of the global weights. ``tensors``: rows ``[name, [dimensions]]``.
    ``participation``/``sample_share``: how `gateway.sampling` chose the invited from ``population`` devices.
    ``max_epsilon``: no start past this at ``delta`` (0: no budget). ``statistics``: BatchNorm's running statistics stay
    at ``home`` (then no tensor of the round may be one) or are ``shared`` (then clip and noise cover them too).
    ``reference``, ``reference_by``: digest of the trusted update of the rule fltrust, and who signed it
    (`gateway.references`).
    ``publish``: new ``weights``, or this shard's ``partial`` sum for a root (`gateway.shards`).
    ``threshold_active``: floor(2n/3)+1 shares are needed (a lying gateway), else floor(n/2)+1.
    ``max_cohort``: a masked round over more devices is divided into cohorts of at most so many, ``cohorts_at_once`` of
    which run together (`gateway.parted`). ``shard_silence_s``, ``shards_limit_s``: a root's patience with its shards.
    ``adaptive_clip``: the clip follows the ``clip_quantile`` of the devices' norms from round to round, by steps of at
    most ``clip_rate`` in the exponent (Andrew et al. 2021); ``clip_noise``: deviation of the noise on the count of
    devices within the clip, which privacy accounting charges with the round. ``part``: set by `gateway.cohorts` only.
    """

    round: int
    model: str
    base: bytes
    base_bytes: int
    tensors: tuple[Any, ...]
    cohort: str = "0"
    privacy: str = CLEAR
    quorum: int = 1
    min_cohort: int = 32
    threshold_active: bool = False
    deadline_s: float = 120.0
    join_s: float = 10.0
    step_s: float = 10.0
    stall_s: float = 30.0
    resend_s: float = 4.0
    uploads_at_once: int = 8
    max_update_bytes: int = 256 << 20
    clip: float = 10.0
    fraction_bits: int = 16
    max_weight: int = 1000
    encoding: str = "float32"
    keep: float = 1.0
    seed: bytes = b""
    noise: str = "none"
    noise_multiplier: float = 0.0
    colluders: int = 0
    delta: float = 1e-5
    participation: str = "all"
    population: int = 0
    sample_share: float = 1.0
    max_epsilon: float = 0.0
    statistics: str = "home"
    late: str = "drop"
    max_staleness: int = 1
    rule: str = "mean"
    reference: bytes = b""
    reference_by: str = ""
    publish: str = "weights"
    server_rate: float = 1.0
    max_cohort: int = 64
    cohorts_at_once: int = 1
    shard_silence_s: float = 60.0
    shards_limit_s: float = 3600.0
    adaptive_clip: bool = False
    clip_quantile: float = 0.5
    clip_rate: float = 0.2
    clip_noise: float = 0.0
    part: str = ""
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.privacy not in {CLEAR, MASKED} or self.rule not in RULES or self.late not in {"drop", "next"}:
            raise ConfigError("a round's privacy, rule or late policy is unknown")
        if self.privacy == MASKED and self.rule != "mean":
            raise ConfigError(f"the rule {self.rule} needs single updates", hint='privacy = "clear"')
        if self.privacy == MASKED and (self.late != "drop" or self.encoding not in {"float32", "randomk"}):
            raise ConfigError("masked rounds take no late updates and no compression but randomk")
        if self.rule != "mean" and self.encoding in {"topk", "randomk"}:
            raise ConfigError(f"the rule {self.rule} compares whole updates", hint='encoding = "float32"')
        if self.statistics == "home" and any(str(row[0]).endswith(STATISTICS) for row in self.tensors):
            raise ConfigError("BatchNorm statistics stay at home", hint='leave them out, or statistics = "shared"')
        if self.publish not in {"weights", "partial"} or (
            self.publish == "partial" and self.rule in {"trimmed", "median"}
        ):
            raise ConfigError('publish is "weights" or, for sums, "partial"')
        if (self.rule == "fltrust") != bool(self.reference):
            raise ConfigError("the rule fltrust, and only it, needs a reference update")
        if self.noise != "none" and (self.max_weight != 1 or self.noise_multiplier <= 0):
            raise ConfigError("noise needs max_weight = 1 and a positive noise_multiplier")
        if self.noise == "distributed" and self.privacy != MASKED:
            raise ConfigError("distributed noise only hides under masks", hint='privacy = "masked"')
        if self.noise != "none" and self.late != "drop":
            raise ConfigError("a late update would be a second one of its device", hint='with noise: late = "drop"')
        if self.quorum < 1 or self.deadline_s <= 0 or self.uploads_at_once < 1:
            raise ConfigError("a round needs a quorum, a deadline and a slot")
        if self.max_cohort < 2 or self.cohorts_at_once < 1:
            raise ConfigError("max_cohort is 2 or more, cohorts_at_once 1 or more")
        if self.adaptive_clip:
            self._check_adaptive()

    def _check_adaptive(self) -> None:
        """Adaptive clipping needs a sum of one bit a device, and noise on it where the round promises privacy."""
        if self.rule != "mean":
            raise ConfigError(
                f"the rule {self.rule} sums no updates, so nobody can be counted", hint="adaptive_clip needs rule mean"
            )
        if self.late != "drop":
            raise ConfigError("adaptive_clip counts the devices of this round", hint='late = "drop"')
        if not 0 < self.clip_quantile < 1 or not 0 < self.clip_rate <= 1 or self.fraction_bits < 1:
            raise ConfigError("clip_quantile lies in (0, 1), clip_rate in (0, 1], fraction_bits from 1")
        if (self.noise == "none") != (self.clip_noise == 0) or self.clip_noise < 0:
            raise ConfigError(
                "clip_noise is above 0 in rounds with noise, and only there",
                hint="a twentieth of the devices is a good value",
            )

    @property
    def key(self) -> str:
        """Names this round, or this cohort of it, among all that a gateway runs."""
        return f"{self.round}-{self.part}" if self.part else str(self.round)


def announcement(plan: RoundPlan, devices: int, now: float) -> RoundOpen:
    """The announcement; raises ConfigError where the ring could overflow."""
    survivors = max(plan.quorum, plan.min_cohort) if plan.privacy == MASKED else plan.quorum
    ring = choose_ring(
        fraction_bits=plan.fraction_bits,
        bound=value_bound(plan.clip, adaptive=plan.adaptive_clip),
        max_weight=plan.max_weight,
        devices=max(devices * (1 + plan.max_staleness if plan.late == "next" else 1), 1),
        slack=slack_of(plan.noise, plan.noise_multiplier * plan.clip, plan.clip_noise, plan.fraction_bits),
    )
    return RoundOpen(
        round=plan.round,
        cohort=plan.cohort,
        model=plan.model,
        base=plan.base,
        base_bytes=plan.base_bytes,
        tensors=plan.tensors,
        privacy=plan.privacy,
        join_by=now + plan.join_s,
        deadline=now + plan.deadline_s,
        clip=plan.clip,
        fraction_bits=plan.fraction_bits,
        ring_bits=ring.bits,
        max_weight=plan.max_weight,
        devices=ring.devices,
        quorum=plan.quorum,
        encoding=plan.encoding,
        keep=plan.keep,
        seed=plan.seed,
        noise=plan.noise,
        noise_multiplier=plan.noise_multiplier,
        survivors=survivors,
        colluders=plan.colluders,
        delta=plan.delta,
        participation=plan.participation,
        statistics=plan.statistics,
        training=dict(plan.training),
        adaptive_clip=plan.adaptive_clip,
        clip_noise=plan.clip_noise,
        late_rounds=plan.max_staleness if plan.late == "next" else 0,
    )
