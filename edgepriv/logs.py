"""Logs on stderr: one line a record, plain or JSON, with systemd's priority prefix when it is listening."""

from __future__ import annotations

import json
import logging
import os
import sys

PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class JsonLines(logging.Formatter):
    """A record as one JSON object; whatever a caller passes as ``extra={"fields": {...}}`` stands beside it."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        entry = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "where": record.name,
            "text": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return json.dumps(entry, default=str)


class PlainLines(logging.Formatter):
    """``<priority>`` for the journal, then where and what."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        prefix = f"<{PRIORITIES.get(record.levelno, 6)}>" if "JOURNAL_STREAM" in os.environ else ""
        return f"{prefix}{record.levelname.lower()} {record.name}: {record.getMessage()}"


def configure_logs(*, json_lines: bool = False, level: int = logging.INFO) -> None:
    """Send the root logger to stderr in one of the two forms."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if json_lines else PlainLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
