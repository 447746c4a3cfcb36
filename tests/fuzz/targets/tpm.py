# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest sends when its vTPM is asked: an event log, a key, a quote; it may be hostile."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from mktme.attest.event_log import LOG_MAX_BYTES, PCRS, EventLog
from mktme.attest.marshal import SHA256, TpmFormatError, sized
from mktme.attest.tpm_keys import TpmKey
from mktme.attest.tpm_quote import Attested, QuoteError, TpmQuote, verify_quote

from ...unit.attest.soft_tpm import BOOT, encode_log
from ..target import Target, refusal

_SHA384: Final = (0xC, 48)
_P256: Final = bytes.fromhex(
    # The generator, which is a point of the curve.
    "6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"
    "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5"
)
ATTESTATION_KEY: Final = sized(
    struct.pack(">HHIHHHHHH", 0x23, SHA256, 0x50072, 0, 0x10, 0x18, SHA256, 3, 0x10)
    + sized(_P256[:32])
    + sized(_P256[32:])
)
ENDORSEMENT_KEY: Final = sized(
    struct.pack(">HHIH32xHHHHHI", 1, SHA256, 0x300B2, 32, 6, 128, 0x43, 0x10, 2048, 0)
    + sized(b"\xc5" * 256)
)
MESSAGE: Final = (
    b"\xffTCG\x80\x18"
    + sized(b"name")
    + sized(bytes(32))
    + struct.pack(">QIIBQ", 1, 1, 0, 1, 1)
    + bytes.fromhex("00000001 000b 03 ff0300")
    + sized(bytes(32))
)


def _refused(parse: Callable[[], object]) -> str:
    """The outcome; only an error of one printable line comes out."""
    try:
        parse()
    except (TpmFormatError, QuoteError) as error:
        assert str(error).isprintable(), error
        return refusal(str(error))
    return "good"


def check_event_log(data: bytes) -> str:
    """A log that is read can be replayed, and what it says be shown."""

    def read() -> None:
        log = EventLog.parse(data)
        values = log.replay()
        assert len(values) == PCRS
        assert all(len(value) == 32 for value in values)
        for event in log.events:
            assert event.label.isprintable()
            assert event.text is None or event.text.isprintable()

    return _refused(read)


def check_key(data: bytes) -> str:
    """A key that is read has a name and a digest."""

    def read() -> None:
        key = TpmKey.parse(data)
        assert len(key.name) == 34
        assert len(key.sha256) == 32

    return _refused(read)


def check_quote(data: bytes) -> str:
    """Nothing that no TPM signed is believed, whatever is in its place.

    The first byte says where the rest goes: the document as a whole, or one of its parts.
    """
    place, rest = data[:1], data[1:]
    if place == b"d":
        return _refused(lambda: verify_quote(TpmQuote.decode(rest), vtpm=bytes(32), nonce=b""))
    if place == b"m":
        return _refused(lambda: Attested.parse(rest))
    parts = {"endorsement_key": ENDORSEMENT_KEY, "attestation_key": ATTESTATION_KEY}
    field = {b"e": "endorsement_key", b"a": "attestation_key", b"s": "signature"}.get(place)
    if field is not None:
        parts[field] = rest
    fields = {"message": MESSAGE, "signature": bytes(8), "event_log": b""} | parts
    quote = TpmQuote(**fields)  # type: ignore[arg-type]
    vtpm = TpmKey.parse(ENDORSEMENT_KEY).sha256
    outcome = _refused(lambda: verify_quote(quote, vtpm=vtpm, nonce=bytes(32)))
    assert outcome != "good"
    return outcome


_SIGNATURE: Final = struct.pack(">HH", 0x18, SHA256) + sized(bytes(32)) + sized(bytes(32))
_DOCUMENT: Final = (
    b'{"schema":"mktme.quote","version":1,"endorsement_key":"","attestation_key":"",'
    b'"message":"","signature":"","event_log":""}'
)

TARGETS: Final = (
    Target(
        "event-log",
        check_event_log,
        (encode_log(BOOT), encode_log(BOOT, [(0xB, 32), _SHA384]), encode_log(())),
        max_bytes=min(16 << 10, LOG_MAX_BYTES),
        tokens=(b"Spec ID Event03\0", b"StartupLocality\0", b"grub_cmd: "),
    ),
    Target("tpm-key", check_key, (ATTESTATION_KEY, ENDORSEMENT_KEY), max_bytes=1024),
    Target(
        "tpm-quote",
        check_quote,
        (
            b"d" + _DOCUMENT,
            b"m" + MESSAGE,
            b"e" + ENDORSEMENT_KEY,
            b"a" + ATTESTATION_KEY,
            b"s" + _SIGNATURE,
        ),
        max_bytes=2048,
        tokens=(b"mktme.quote", b"\xffTCG\x80\x18"),
    ),
)
