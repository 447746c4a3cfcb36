# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes wrong around evidence; the whole tree is in `mktme.engine.errors`."""

from __future__ import annotations

from mktme.engine.errors import MktmeError


class AttestationError(MktmeError):
    """Root of this package's errors."""


class TokenError(AttestationError):
    """What came is no evidence of this profile; of one line, and without what was in it."""


class CertificateError(AttestationError):
    """A certificate, chain or CA that cannot be used."""


class MeasurementError(AttestationError):
    """What a VM was launched from cannot be measured, or contradicts its domain."""


class PolicyError(AttestationError):
    """A policy that says nothing that can be appraised.

    Attributes:
        key: the setting, as policy.toml calls it; empty for the file as a whole.
    """

    def __init__(self, key: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(f"{key}: {message}" if key else message, hint=hint)
        self.key = key


class ReferenceValuesError(AttestationError):
    """Reference values that cannot be read."""


class JweError(AttestationError):
    """A JWE that cannot be opened; it does not say more, since its sender may be an attacker."""
