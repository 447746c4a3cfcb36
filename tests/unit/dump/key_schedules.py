# SPDX-License-Identifier: GPL-2.0-or-later
"""AES key schedules as software keeps them, made one word at a time."""

from __future__ import annotations

from mktme.dump.aes_keys import Form
from mktme.proof.key_patterns import decryption_round_keys, encryption_round_keys


def schedule(key: bytes, form: Form = Form.ENCRYPTION, *, swapped: bool = False) -> bytes:
    """A key's round keys, as one or the other kind of software has them in memory."""
    if form is Form.ENCRYPTION:
        kept = b"".join(encryption_round_keys(key))
    else:
        kept = b"".join(reversed(decryption_round_keys(key)))
    if swapped:
        return b"".join(kept[at : at + 4][::-1] for at in range(0, len(kept), 4))
    return kept


def linux_context(key: bytes) -> bytes:
    """Linux's struct crypto_aes_ctx (include/crypto/aes.h)."""
    both = (schedule(key, form).ljust(240, b"\0") for form in Form)
    return b"".join(both) + len(key).to_bytes(4, "little")
