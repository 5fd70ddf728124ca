"""The launcher's log as JSON lines."""

import json
import logging
import socket
import time

__all__ = ["JsonFormatter"]


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object. Its fields are those of the workers' lines, ``pid`` and ``level``. The stream is ``ferrorun``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object as one line, without a newline."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return json.dumps(
            {
                "time": f"{moment}.{int(record.created * 1000) % 1000:03d}Z",
                "rank": None,
                "local_rank": None,
                "host": socket.gethostname(),
                "stream": "ferrorun",
                "round": None,
                "pid": record.process,
                "level": record.levelname,
                # The text of the exception follows the message, as in the format of text.
                "message": super().format(record),
            },
            separators=(",", ":"),
        )
