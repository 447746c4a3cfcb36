# SPDX-License-Identifier: GPL-2.0-or-later
"""Every target by name.

Modules of targets import the code under test, so they are imported on demand: in a child only
after atheris can instrument what they import.
"""

from __future__ import annotations

import importlib
from typing import Final

from ..target import Target

CONTROL: Final = "control"
"""Has a bug on purpose: a fuzzer that does not find it finds nothing."""

_MODULES: Final = {
    "request": "messages",
    "reply": "messages",
    "remote-request": "lines",
    "remote-reply": "lines",
    "hello": "hellos",
    "call": "hellos",
    "pconfig": "registers",
    "msr": "registers",
    "platform": "files",
    "sidecar": "files",
    "key-file": "files",
    "sizes": "sizes",
    "event-log": "tpm",
    "tpm-key": "tpm",
    "tpm-quote": "tpm",
    "token": "evidence",
    "claims": "evidence",
    "jwe": "evidence",
    CONTROL: "control",
}

NAMES: Final = tuple(name for name in _MODULES if name != CONTROL)


def load(name: str) -> Target:
    """Import a target.

    Raises:
        KeyError: there is none of that name.
    """
    module = importlib.import_module(f".{_MODULES[name]}", __package__)
    targets: tuple[Target, ...] = module.TARGETS
    return next(target for target in targets if target.name == name)
