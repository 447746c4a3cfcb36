# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes docs/broker/openapi.json; a test compares it with the application."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mktme.broker.app import openapi


def document() -> str:
    """The document as the file has it."""
    return json.dumps(openapi(), indent=2) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document(), "utf-8")
