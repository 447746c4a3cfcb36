# SPDX-License-Identifier: GPL-2.0-or-later
"""A TPM's quote of its PCRs, checked against the event log and against the platform's evidence.

The chain, in the order in which it is checked::

    platform's evidence ── vtpm: SHA-256 of the EK that the engine made for this VM
      └─ EK ── only its TPM finds the challenge's secret, and only if it has the AK, too
           └─ AK ── signs nothing but what its TPM says: the secret, and a digest of the PCRs
                └─ event log ── replayed, it gives these PCRs
                     └─ what booted: firmware, boot loader, kernel, command line

So one signature proves that the keys are in one TPM, that this TPM is the VM's, and that the quote
is no older than the challenge.

Source: TPM 2.0 Library, rev. 1.59, Part 2, 10.12.12 (TPMS_ATTEST) and 11.3.4 (TPMT_SIGNATURE);
Part 3, 18.4 (TPM2_Quote). TCG PC Client Platform Firmware Profile 1.05, 3.3.4 (PCR usage).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from mktme.attest.errors import AttestationError
from mktme.attest.event_log import LOG_MAX_BYTES, PCRS, Event, EventKind, EventLog
from mktme.attest.marshal import SHA256, Reader, TpmFormatError
from mktme.attest.tpm_keys import PublicKey, TpmKey

QUOTED_PCRS: Final = tuple(range(10))
"""What firmware, boot loader and kernel extend (PCRs 0 to 7, and 8 and 9 by convention)."""
QUOTE_MAX_BYTES: Final = 2 * LOG_MAX_BYTES

_GENERATED: Final = 0xFF544347
"""TPM_GENERATED_VALUE: no restricted key signs data from outside that begins with it."""
_ATTEST_QUOTE: Final = 0x8018
_RSASSA, _ECDSA = 0x0014, 0x0018
_NAME_MAX_BYTES: Final = 68
_BOOT_LOADER, _COMMANDS, _FILES = 4, 8, 9


class QuoteError(AttestationError):
    """A quote that is not to be believed.

    Attributes:
        check: which link of the chain is broken.
    """

    def __init__(self, check: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.check = check


class TpmQuote(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a guest answers a challenge with: files of tpm2-tools (``-f tss``) and of the kernel.

    Attributes:
        endorsement_key: TPM2B_PUBLIC.
        attestation_key: TPM2B_PUBLIC.
        message: TPMS_ATTEST, what was signed.
        signature: TPMT_SIGNATURE, by the attestation key.
        event_log: `EventLog`.
    """

    schema: Literal["mktme.quote"] = "mktme.quote"
    version: Literal[1] = 1
    endorsement_key: bytes
    attestation_key: bytes
    message: bytes
    signature: bytes
    event_log: bytes

    @classmethod
    def decode(cls, data: bytes) -> TpmQuote:
        """Read what `encode` made: JSON, byte strings in base64.

        Raises:
            QuoteError: it is none.
        """
        if len(data) > QUOTE_MAX_BYTES:
            raise QuoteError("vtpm:quote", f"more than {QUOTE_MAX_BYTES} bytes are no quote")
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise QuoteError("vtpm:quote", "it is no document of the schema mktme.quote") from error

    def encode(self) -> bytes:
        """As a file has it."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


@dataclass(frozen=True, slots=True)
class Attested:
    """What a TPM signed (TPMS_ATTEST of a quote).

    Attributes:
        qualifying: what the asker wanted in it.
        resets: how often the TPM, and so its machine, started since it was made.
        pcrs: which PCRs are quoted, all of the bank of SHA-256.
        pcr_digest: SHA-256 of their values, one after the other.
    """

    qualifying: bytes
    resets: int
    pcrs: tuple[int, ...]
    pcr_digest: bytes

    @classmethod
    def parse(cls, message: bytes) -> Attested:
        """Read a TPMS_ATTEST.

        Raises:
            TpmFormatError: it is none, or not that of a quote of the bank of SHA-256.
        """
        reader = Reader(message, "big", "the quote")
        if reader.number(4) != _GENERATED or reader.number(2) != _ATTEST_QUOTE:
            raise reader.wrong("is not one that a TPM made")
        reader.sized(_NAME_MAX_BYTES)  # of the key: the signature says as much
        qualifying = reader.sized(64)
        reader.take(8)  # clock
        resets = reader.number(4)
        reader.take(4 + 1 + 8)  # restarts, whether the clock is safe, version of the firmware
        if reader.number(4) != 1 or reader.number(2) != SHA256:
            raise reader.wrong("is of another bank than that of SHA-256, or of several")
        selection = reader.take(reader.number(1))
        bits = int.from_bytes(selection, "little")
        if bits >> PCRS:
            raise reader.wrong("is of PCRs that there are not")
        pcrs = tuple(pcr for pcr in range(PCRS) if bits >> pcr & 1)
        digest = reader.sized(64)
        reader.end()
        return cls(qualifying, resets, pcrs, digest)


@dataclass(frozen=True, slots=True)
class MeasuredBoot:
    """What a quote proves that a guest booted.

    Attributes:
        pcrs: the values of `QUOTED_PCRS`.
        log: what led to them.
        resets: how often its TPM was started.
    """

    pcrs: Mapping[int, bytes]
    log: EventLog
    resets: int

    @property
    def boot_loaders(self) -> tuple[bytes, ...]:
        """Programs that firmware started, as Authenticode hashes them: shim, GRUB (PCR 4)."""
        kind = EventKind.EFI_BOOT_SERVICES_APPLICATION
        return tuple(event.sha256 for event in self.log.of(_BOOT_LOADER, kind))

    @property
    def commands(self) -> tuple[str, ...]:
        """What GRUB did, and with which command line it started the kernel (PCR 8)."""
        texts = (event.text for event in self.log.of(_COMMANDS, EventKind.IPL))
        return tuple(text for text in texts if text is not None)

    @property
    def files(self) -> tuple[Event, ...]:
        """What GRUB read, kernel and initramfs among it (PCR 9): `sha256` is the file's.

        The names are only what GRUB says; which GRUB that is, `boot_loaders` tells.
        """
        return tuple(self.log.of(_FILES, EventKind.IPL))


def verify_quote(
    quote: TpmQuote,
    *,
    vtpm: bytes | None,
    nonce: bytes,
    reference: Mapping[int, frozenset[bytes]] | None = None,
) -> MeasuredBoot:
    """Check the whole chain.

    Args:
        quote: what the guest answered.
        vtpm: what the platform's evidence says of the VM's TPM: SHA-256 of the EK, 32 bytes.
            None if it says of none.
        nonce: the secret of the `Challenge` that was made for these two keys.
        reference: PCRs that have to have one of these values.

    Raises:
        QuoteError: a link of it is broken.
    """
    endorsement, attestation = _keys(quote)
    if vtpm is None:
        raise QuoteError("vtpm:key", "the evidence says of no vTPM")
    if not hmac.compare_digest(endorsement.sha256, vtpm):
        raise QuoteError("vtpm:key", "the endorsement key is not the one of the VM's vTPM")
    _verify_signature(attestation.key, quote.message, quote.signature)
    try:
        attested = Attested.parse(quote.message)
    except TpmFormatError as error:
        raise QuoteError("vtpm:quote", str(error)) from error
    if not hmac.compare_digest(attested.qualifying, nonce):
        raise QuoteError("vtpm:nonce", "the quote is no answer to this challenge")
    if attested.pcrs != QUOTED_PCRS:
        raise QuoteError(
            "vtpm:pcrs", f"it is to be of PCRs 0 to {QUOTED_PCRS[-1]}, and of no others"
        )
    try:
        log = EventLog.parse(quote.event_log)
    except TpmFormatError as error:
        raise QuoteError("vtpm:log", str(error)) from error
    values = log.replay()
    pcrs = {pcr: values[pcr] for pcr in QUOTED_PCRS}
    if hashlib.sha256(b"".join(pcrs.values())).digest() != attested.pcr_digest:
        raise QuoteError("vtpm:log", "the event log does not lead to what the PCRs are")
    for pcr, expected in (reference or {}).items():
        if pcrs.get(pcr) not in expected:
            raise QuoteError(f"vtpm:pcr-{pcr}", f"PCR {pcr} is not what the reference has")
    return MeasuredBoot(pcrs, log, attested.resets)


def quoted_keys(endorsement_key: bytes, attestation_key: bytes) -> tuple[TpmKey, TpmKey]:
    """A guest's EK and AK, for `make_credential`.

    Raises:
        TpmFormatError: they are none.
    """
    attestation = TpmKey.parse(attestation_key)
    attestation.require_attestation_key()
    return TpmKey.parse(endorsement_key), attestation


def _keys(quote: TpmQuote) -> tuple[TpmKey, TpmKey]:
    try:
        return quoted_keys(quote.endorsement_key, quote.attestation_key)
    except TpmFormatError as error:
        raise QuoteError("vtpm:key", str(error)) from error


def _verify_signature(key: PublicKey, message: bytes, signature: bytes) -> None:
    reader = Reader(signature, "big", "the quote's signature")
    sha256 = hashes.SHA256()
    try:
        scheme, hash_algorithm = reader.number(2), reader.number(2)
        if hash_algorithm != SHA256:
            raise reader.wrong("is not by SHA-256")
        if scheme == _RSASSA and isinstance(key, rsa.RSAPublicKey):
            raw = reader.sized(256)
            reader.end()
            key.verify(raw, message, PKCS1v15(), sha256)
        elif scheme == _ECDSA and isinstance(key, ec.EllipticCurvePublicKey):
            r, s = (int.from_bytes(reader.sized(32), "big") for _ in "rs")
            reader.end()
            key.verify(encode_dss_signature(r, s), message, ec.ECDSA(sha256))
        else:
            raise reader.wrong("is not one of its key")
    except (InvalidSignature, TpmFormatError) as error:
        raise QuoteError("vtpm:signature", "the attestation key did not sign this") from error
