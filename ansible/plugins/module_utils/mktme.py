# SPDX-License-Identifier: GPL-2.0-or-later
"""What both modules need of mktme's Python package, which their interpreter must have."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

try:
    import msgspec

    from mktme.engine.errors import MktmeError
except ImportError:
    MKTME_ERROR: str | None = traceback.format_exc()
else:
    MKTME_ERROR = None

DEPLOYMENT = dict(type="str", default="default")


def require_mktme(module: AnsibleModule) -> None:
    """Fail unless this interpreter has mktme."""
    if MKTME_ERROR is not None:
        module.fail_json(msg=missing_required_lib("mktme"), exception=MKTME_ERROR)


@contextlib.contextmanager
def failing(module: AnsibleModule) -> Iterator[None]:
    """Turn mktme's errors within the `with` into the module's failure."""
    try:
        yield
    except MktmeError as error:
        hint = "" if error.hint is None else f"; {error.hint}"
        module.fail_json(msg=f"{error}{hint}", error=type(error).__name__)


def plain(document: object) -> Any:
    """A document of mktme's as what Ansible returns."""
    return msgspec.to_builtins(document)


class Silent:
    """A narrator: a module says nothing before its end, but for warnings."""

    def __init__(self, module: AnsibleModule) -> None:
        self._module = module

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A step that begins now."""
        yield

    def notice(self, line: str) -> None:
        """Something is not as it was asked for."""
        self._module.warn(line)


def absolute(path: str) -> str:
    """A path of the user's, whichever directory Ansible runs modules in."""
    return os.path.abspath(os.path.expanduser(path))
