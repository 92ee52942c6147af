"""Logs on stderr: one line a record, plain or JSON, with systemd's priority prefix when the journal is listening."""

from __future__ import annotations

import json
import logging
import os
import sys

FIELDS = ("party", "kind", "outcome", "reason", "bytes")
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class JsonLines(logging.Formatter):
    """A record as one JSON object, with what was handed along as ``extra`` under the names of ``FIELDS``."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        body = {"at": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name}
        known = {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        text = {**body, "message": record.getMessage(), **known}
        if record.exc_info:
            text["error"] = self.formatException(record.exc_info)
        return json.dumps(text, default=str)


class PlainLines(logging.Formatter):
    """Plain lines; the journal keeps the time and reads ``<N>`` as the priority."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        text = super().format(record)
        return f"<{_PRIORITIES.get(record.levelno, 6)}>{text}" if self._journal else text


def configure_logs(level: str = "info", *, json_lines: bool = False) -> None:
    """Send all logs to stderr in one of the two forms."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if json_lines else PlainLines(journal="JOURNAL_STREAM" in os.environ))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
