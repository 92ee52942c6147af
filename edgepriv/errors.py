"""Every exception of edgepriv, grouped by who must act; one exit code for each group.

Rules: a message says what is wrong, whose mistake it is and, in ``hint``, what to do. No message carries key
material or image bytes. Exit codes follow sysexits where one fits; 3 is ours (a risk above the threshold).
"""

from __future__ import annotations


class EdgeprivError(Exception):
    """Base of all errors that edgepriv raises on purpose; ``exit_code`` is what the commands end with."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


# --- the person at the keyboard must act ------------------------------------------------------------------


class ConfigError(EdgeprivError):
    """A configuration file or flag is wrong: unknown key, wrong type, contradiction."""

    exit_code = 78


class MissingFileError(EdgeprivError):
    """A file that was named does not exist or cannot be read: a model, a picture, a data set."""

    exit_code = 66


class DataError(EdgeprivError):
    """A file was read but its content is not usable: not an image, not an ONNX model, labels out of range."""

    exit_code = 65


class MissingDependencyError(EdgeprivError):
    """An optional library is needed and not installed; the hint names the extra."""

    exit_code = 71


class RefusedError(EdgeprivError):
    """A policy forbids what was asked: a privacy budget is spent, a margin is not met, a cohort is too small."""

    exit_code = 73


class RiskThresholdError(EdgeprivError):
    """An audit ended above the threshold that was asked for, so that a build can be stopped by it."""

    exit_code = 3


# --- the owner of the keys must act -----------------------------------------------------------------------


class KeyFileError(EdgeprivError):
    """A key file is malformed, has the wrong purpose or can be read by others."""

    exit_code = 72


class TrustError(EdgeprivError):
    """The trust list or a permission is unsigned, expired, rolled back, revoked, or does not name the party."""

    exit_code = 67


class AuthenticationError(EdgeprivError):
    """A wrong key, a forged or altered message. One message for all causes: it must not help an attacker."""

    exit_code = 77


# --- the other side sent something wrong ------------------------------------------------------------------


class WireError(EdgeprivError):
    """Bytes from outside are not a valid message: malformed, truncated, over a limit, unknown version."""

    exit_code = 76


class ReplayError(WireError):
    """A message that was already accepted, or one that reuses a counter with other content."""


# --- the machine or its surroundings must recover ---------------------------------------------------------


class StorageFullError(EdgeprivError):
    """The disk or a configured byte limit is full; nothing that was accepted is dropped."""

    exit_code = 74


class UnavailableError(EdgeprivError):
    """A service is not there: no broker, no gateway, no camera."""

    exit_code = 69


class TemporaryError(EdgeprivError):
    """It did not work this time; trying again later may."""

    exit_code = 75
