"""A whole site in a folder: keys, trust list and configuration files, made as an operator would make them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepriv.keys import Identity
from edgepriv.wire.trust import TrustList, sign_trust

if TYPE_CHECKING:
    from pathlib import Path

GATEWAY, RISK, RECIPIENT = "gateway-site", "risk-site", "op-site"
POLICY, MAX_BITS, SCENE_BITS = "argmax", 16.0, 256.0
DAY_S = 86_400
MIN_COHORT = 3


@dataclass(frozen=True, slots=True)
class Site:
    """Where everything lies. ``devices`` are full names."""

    folder: Path
    devices: tuple[str, ...]

    def key(self, name: str) -> Path:
        """Private key file of a party."""
        return self.folder / "keys" / f"{name}.key"

    @property
    def owner(self) -> Path:
        """The owner's public key, which everybody pins."""
        return self.folder / "keys" / "owner.key.pub"

    @property
    def trust(self) -> Path:
        """The signed trust list."""
        return self.folder / "trust.cbor"

    def config(self, name: str) -> Path:
        """A party's configuration file."""
        return self.folder / f"{name}.toml"


def make_site(folder: Path, devices: int) -> Site:
    """Make keys for all parties and sign the trust list."""
    (folder / "keys").mkdir(parents=True, exist_ok=True, mode=0o700)
    site = Site(folder, tuple(f"dev-{i + 1}" for i in range(devices)))
    roles = {GATEWAY: "gateway", RISK: "risk", RECIPIENT: "recipient", **dict.fromkeys(site.devices, "device")}
    owner = Identity.new("owner", "owner")
    owner.save(site.key("owner"))
    parties = []
    for name, role in roles.items():
        identity = Identity.new(role, name)
        identity.save(site.key(name))
        parties.append(identity.public)
    now = int(time.time())
    trust = TrustList(version=1, issued=now, expires=now + 30 * DAY_S, parties=tuple(parties))
    site.trust.write_bytes(sign_trust(trust, owner))
    return site


def table(name: str, **values: object) -> str:
    """A table of a configuration file."""
    return f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()) + "\n"


def round_privacy(devices: int) -> str:
    """Masked where a cohort can be formed; the demo's is far below the 32 that a real site should ask for."""
    return "masked" if devices >= MIN_COHORT else "clear"


def write_gateway(site: Site, broker: str, *, port: int, weights: Path | None, devices: int) -> Path:
    """Configuration of the gateway; with weights the demo starts rounds, one after the other."""
    text = table(
        "gateway", identity=f"keys/{GATEWAY}.key", owner="keys/owner.key.pub", trust="trust.cbor", state="gateway"
    )
    text += table("broker", url=broker)
    text += table("http", port=port)
    text += table("outputs", window_s=10, publish_every_s=1.0)
    text += table("models", require_verdict=True, policies=[POLICY])
    if weights is not None:
        text += table(
            "rounds", model="backbone", weights=str(weights), quorum=max(1, devices // 2 + 1),
            min_cohort=MIN_COHORT, privacy=round_privacy(devices), deadline_s=40.0, join_s=4.0, clip=8.0,
            max_weight=1000, active_s=600.0, resend_s=1.0,
        )  # fmt: skip
        text += "[rounds.training]\nlearning_rate = 0.02\nbatch_size = 8\nepochs = 5\nmomentum = 0.9\n"
    site.config(GATEWAY).write_text(text)
    return site.config(GATEWAY)


def write_device(
    site: Site, name: str, broker: str, *, model: Path, data: str, rows: list[int], seed: int, frames: int, masked: bool
) -> Path:
    """Configuration of one simulated device: only the frame source differs from a real one."""
    text = table(
        "device", key=f"keys/{name}.key", trust="trust.cbor", owner="keys/owner.key.pub", gateway=GATEWAY, state=name
    )
    text += table("broker", url=broker)
    text += table("model", path=str(model), threads=1)
    text += table("source", kind="simulated", data=data, rows=rows, seed=seed)
    # the demo takes its pictures as fast as it can, so all of them may fall into the window of one scene
    budget = max(SCENE_BITS, MAX_BITS * frames)
    text += table("release", policy=POLICY, max_bits_per_inference=MAX_BITS, bits_per_scene=budget)
    # a run with few frames still trains, on what there is
    text += table("rounds", min_cohort=MIN_COHORT, require_masks=masked, min_samples=min(8, frames))
    if not masked:
        # so few devices cannot hide each other; the report shows what such an update gives away as it is
        text += table("self_check", policy="send")
    text += table("run", frames=frames, linger_s=100_000.0, status_s=2.0)
    site.config(name).write_text(text)
    return site.config(name)


def write_risk(site: Site, broker: str, *, port: int, probe: Path) -> Path:
    """Configuration of the risk service; the probe data are public pictures, never a device's frames."""
    text = table(
        "risk", identity=f"keys/{RISK}.key", owner="keys/owner.key.pub", trust="trust.cbor", state="risk",
        gateway=GATEWAY,
    )  # fmt: skip
    text += table("broker", url=broker)
    text += table("audit", probe=str(probe), policies=[POLICY, "unsafe_raw_logits"], auditors="ridge")
    text += table("http", port=port)
    site.config(RISK).write_text(text)
    return site.config(RISK)
