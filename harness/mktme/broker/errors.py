# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes wrong around the key broker; the whole tree is in `mktme.engine.errors`."""

from __future__ import annotations

from mktme.engine.errors import MktmeError


class BrokerError(MktmeError):
    """Root of this package's errors."""


class BrokerSetupError(BrokerError):
    """What an administrator asked for makes no sense, or is not there."""


class StoreError(BrokerError):
    """The store is not as the broker left it, or cannot be read: nothing is released from it."""


class AuditError(BrokerError):
    """A decision cannot be recorded; so it is not carried out."""


class DeniedError(BrokerError):
    """A client does not get what it asked for; in the broker and, as it was told, in the client.

    Attributes:
        status: of HTTP.
        kind: what kind of problem, the last part of its type's URI.
        checks: the names of those that failed.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        kind: str,
        checks: tuple[str, ...] = (),
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.kind = kind
        self.checks = checks


class BrokerGoneError(BrokerError):
    """The broker cannot be reached, is not who it should be, or answers what is no answer."""
