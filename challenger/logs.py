"""How a watchtower logs: for people, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import re

LOG_FORMATS = ("text", "json")
_PLACES = re.compile(r"\b(job|game) ([0-9a-f]{64})\b")  # what most messages are about
_CHATTY = ("httpx", "alembic")  # a line for each tensor, and for each look at the schema


class JsonLines(logging.Formatter):
    """time (Unix seconds), level, logger, message; job, game where the message names one; fault: a stack trace."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        line: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
            **{kind: id for kind, id in reversed(_PLACES.findall(message))},
        }
        if record.exc_info:
            line["fault"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up(log_format: str) -> None:
    """Everything from INFO on, on standard error."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s")
    handler.setFormatter(JsonLines() if log_format == "json" else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
