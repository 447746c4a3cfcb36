# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes wrong around provisioning; the whole tree is in `mktme.engine.errors`."""

from __future__ import annotations

from mktme.engine.errors import MktmeError
from mktme.vm.host import UsageError


class ProvisionError(MktmeError):
    """The provisioner could not do, or not be asked for, something."""


class LeftOffError(ProvisionError):
    """A command was interrupted; the provisioner finishes the step in hand, and begins no other."""


class TenantsError(UsageError):
    """A tenants.toml that says nothing that can be provisioned.

    Attributes:
        key: the setting, with the tables that it is in; empty for the file as a whole.
    """

    def __init__(self, key: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(f"{key}: {message}" if key else message, hint=hint)
        self.key = key
