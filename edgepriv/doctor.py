"""Self-checks that device and gateway share: each finding says what is wrong and how to mend it.

Rules: a check never changes anything and never raises; what goes wrong inside it is its finding. States: ``ok``,
``warning`` (works now, will not for ever), ``failed`` (does not work), ``skipped`` (does not apply here).
"""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
import socket
import ssl
import stat
import subprocess
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgepriv import primitives
from edgepriv.errors import EdgeprivError, KeyFileError, MissingFileError, TrustError
from edgepriv.primitives import cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from edgepriv.mqtt import TlsFiles
    from edgepriv.wire.trust import TrustList

SCHEMA = "edgepriv.doctor/1"
OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
OLDEST_CLOCK = 1_767_225_600  # 2026-01-01: a clock before this has never been set
DAY_S = 86_400
CERTIFICATE_DAYS = 14
MIN_FREE_BYTES = 200_000_000
CHUNK_PACKET_BYTES = 66_000
CONNECT_S = 8.0
RENEW = "renew it: edgepriv renew on a device (its timer does so), else as it was made"


@dataclass(frozen=True, slots=True)
class Finding:
    """One result; ``remedy`` is empty when nothing is to be done."""

    name: str
    state: str
    text: str
    remedy: str = ""


def guarded(name: str, check: Callable[[], Finding], remedy: str) -> Finding:
    """Run a check; an error inside it becomes a failed finding with the error's own hint."""
    try:
        return check()
    except EdgeprivError as error:
        return Finding(name, FAILED, str(error), error.hint or remedy)
    except Exception as error:  # a doctor that crashes helps nobody
        return Finding(name, FAILED, f"{type(error).__name__}: {error}", remedy)


def clock() -> Finding:
    """Is the time plausible, and is it kept?"""
    now = time.time()
    if now < OLDEST_CLOCK:
        text = f"the clock says {time.strftime('%Y-%m-%d', time.gmtime(now))}"
        return Finding("clock", FAILED, text, "set the time, and enable systemd-timesyncd or a hardware clock")
    try:
        done = subprocess.run(
            ["timedatectl", "show", "--property=NTPSynchronized", "--value"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
        kept = done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        kept = ""
    if kept == "no":
        return Finding(
            "clock", WARNING, "the clock is plausible but not synchronised", "systemctl enable --now systemd-timesyncd"
        )
    return Finding("clock", OK, "synchronised" if kept == "yes" else "plausible")


def disk(path: Path, *, min_free_bytes: int = MIN_FREE_BYTES) -> Finding:
    """Is there room where state is kept?"""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < min_free_bytes:
        return Finding(
            "disk", FAILED, f"{free / 1e6:.0f} MB free at {existing}", "free space, or move the state folder"
        )
    state = WARNING if free < 5 * min_free_bytes else OK
    return Finding(
        "disk", state, f"{free / 1e9:.1f} GB free at {existing}", "free space soon" if state == WARNING else ""
    )


def private_files(paths: Iterable[Path | None]) -> Finding:
    """Can anybody but the owner read a key?"""
    checked = 0
    for path in paths:
        if path is None:
            continue
        if not path.is_file():
            return Finding("key files", FAILED, f"{path} is missing", "make it, or name the right path")
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO) and "/credentials/" not in str(path):
            return Finding("key files", FAILED, f"{path} has mode {stat.S_IMODE(mode):04o}", f"chmod 600 {path}")
        checked += 1
    return Finding("key files", OK, f"{checked} files that only their owner reads")


def certificate_expiry(path: Path | None) -> float:
    """When a PEM certificate expires, Unix seconds; 0 where there is none or it cannot be read."""
    if path is None:
        return 0.0
    try:
        # The only reader of one certificate that the standard library has; its output format is documented.
        decode: Any = ssl._ssl._test_decode_cert  # type: ignore[attr-defined]  # noqa: SLF001
        return float(ssl.cert_time_to_seconds(decode(str(path))["notAfter"]))
    except (OSError, ValueError, KeyError, AttributeError):
        return 0.0


def certificate(path: Path | None, *, now: float) -> Finding:
    """How long does the TLS certificate live?"""
    if path is None:
        return Finding("certificate", SKIPPED, "no TLS certificate is configured")
    if not path.is_file():
        return Finding("certificate", FAILED, f"{path} is missing", "make it, or name the right path")
    expires = certificate_expiry(path)
    if not expires:
        return Finding("certificate", FAILED, f"{path} is no certificate that can be read", "is it PEM?")
    left = (expires - now) / DAY_S
    if left <= 0:
        return Finding("certificate", FAILED, f"{path} expired {-left:.0f} days ago", RENEW)
    state = WARNING if left < CERTIFICATE_DAYS else OK
    return Finding("certificate", state, f"{left:.0f} days left", RENEW if state == WARNING else "")


def trusted(key: Path, owner: Path, trust: Path, *, role: str, now: float) -> TrustList:
    """The trust list that names the key's holder in its role.

    Raises:
        MissingFileError: one of the three is not there.
        KeyFileError: a key of another role, or not the owner's.
        TrustError: not the owner's list, expired, or without this party and its keys.
    """
    from edgepriv.keys import load_identity, load_public
    from edgepriv.wire.trust import read_trust

    identity, public = load_identity(key), load_public(owner)
    if identity.public.role != role:
        hint = f"name the file that edgepriv keys new --role {role} made"
        raise KeyFileError(f"{key} is the key of {identity.name}, not of a {role}", hint=hint)
    if public.role != "owner":
        hint = "name the owner's owner.key.pub"
        raise KeyFileError(f"{owner} is the key of {public.name}, not of an owner", hint=hint)
    try:
        raw = trust.read_bytes()
    except OSError as error:
        hint = "the owner makes it: edgepriv owner sign; or name the right path"
        raise MissingFileError(f"cannot read the trust list {trust}: {error.strerror}", hint=hint) from None
    listed = read_trust(raw, public.ed25519, now=now)
    if listed.party(identity.name, role) != identity.public:
        raise TrustError(
            f"it has other keys for {identity.name}", hint=f"the owner signs {key}.pub: edgepriv owner sign"
        )
    return listed


def port(host: str, number: int) -> str:
    """Why nothing can listen there, in words; empty where it is free."""
    try:
        socket.create_server((host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def in_use(state: Path, unit: str) -> bool:
    """Whether a process holds the state folder's lock; the service manager is asked where the lock cannot be read."""
    try:
        with (state / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except PermissionError:
        return _systemctl("is-active", "--quiet", unit) is not None
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def unit_environment(unit: str) -> str:
    """What a unit gives its service in the environment; empty where there is no such unit or no service manager."""
    return _systemctl("show", "--property=Environment", "--value", unit) or ""


def _systemctl(*words: str) -> str | None:
    """What systemctl prints, or None where it says no or is not there."""
    try:
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def crypto() -> Finding:
    """Does the CPU have AES, and is the fast backend there?"""
    backend, flags = primitives.backend().name, cpu.flags()
    text = f"{platform.machine()}, backend {backend}, {cpu.choose_alg()} by default"
    if backend != "openssl":
        return Finding("crypto", WARNING, text, "pip install 'edgepriv[device]' for OpenSSL's speed")
    return Finding("crypto", OK, text if "aes" in flags else f"{text} (no AES instructions)")


def broker(url: str, name: str, *, tls: TlsFiles | None, username: str | None, password_file: Path | None) -> Finding:
    """Does the broker answer and let us in, and how large may a packet be?"""
    from edgepriv.mqtt import open_link

    link = open_link(url, f"{name}-doctor", tls=tls, username=username, password_file=password_file)
    try:
        link.wait(CONNECT_S)
        limit = link.max_packet_bytes
    finally:
        link.close()
    if limit < CHUNK_PACKET_BYTES:
        return Finding(
            "broker", WARNING, f"packets of at most {limit} bytes", "set max_packet_size 262144 at the broker"
        )
    return Finding("broker", OK, f"{url} answers, packets of up to {limit} bytes")


def summary(who: str, findings: list[Finding]) -> dict[str, Any]:
    """The document of ``--json``."""
    return {
        "schema": SCHEMA,
        "who": who,
        "ok": all(f.state != FAILED for f in findings),
        "findings": [asdict(f) for f in findings],
    }


def lines(findings: list[Finding]) -> list[str]:
    """The same for people."""
    out = []
    for finding in findings:
        out.append(f"{finding.state:8}{finding.name}: {finding.text}")
        if finding.remedy:
            out.append(f"        what to do: {finding.remedy}")
    return out


def show(who: str, findings: list[Finding], *, as_json: bool) -> tuple[str, int]:
    """Text for stdout and the exit code: 1 where something failed."""
    document = summary(who, findings)
    return json.dumps(document) if as_json else "\n".join(lines(findings)), 0 if document["ok"] else 1
