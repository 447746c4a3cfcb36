# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of records that are only ever appended to: audit logs."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path


def open_append(path: Path) -> int:
    """Open a file to append to, made (0600) if it is not there; returns the descriptor.

    Raises:
        OSError: it cannot be opened, or is a symbolic link.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(path, flags, 0o600)


def timestamp(at: datetime) -> str:
    """A time in UTC as records have it: RFC 3339, with milliseconds."""
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
