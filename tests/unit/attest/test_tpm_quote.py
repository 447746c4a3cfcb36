# SPDX-License-Identifier: GPL-2.0-or-later
"""Quotes of a real TPM (swtpm), taken by tpm2-tools as in a guest; and those that are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization

from mktme.attest.event_log import EventKind, EventLog
from mktme.attest.marshal import TpmFormatError, sized
from mktme.attest.reference import Reference
from mktme.attest.result import Verdict
from mktme.attest.tpm_keys import Challenge, TpmKey, make_credential
from mktme.attest.tpm_quote import (
    QUOTE_MAX_BYTES,
    QUOTED_PCRS,
    Attested,
    QuoteError,
    TpmQuote,
    verify_quote,
)
from mktme.vm.console import VmError
from mktme.vm.guest_tpm import take_quote

from .signing import POLICY, Platform
from .soft_tpm import BOOT, LogEvent, SoftTpm, encode_log, soft_tpm


@pytest.fixture(scope="module")
def tpm() -> Iterator[SoftTpm]:
    # Not tmp_path: the paths of UNIX sockets are short.
    with tempfile.TemporaryDirectory(prefix="mt-") as directory, soft_tpm(Path(directory)) as one:
        one.extend(BOOT)
        (one.directory / "log").write_bytes(encode_log(BOOT))
        yield one


@pytest.fixture(scope="module")
def other_tpm() -> Iterator[SoftTpm]:
    with tempfile.TemporaryDirectory(prefix="mt-") as directory, soft_tpm(Path(directory)) as one:
        yield one


@pytest.fixture(scope="module")
def taken(tpm: SoftTpm) -> tuple[TpmQuote, bytes]:
    return quote_of(tpm)


def quote_of(tpm: SoftTpm) -> tuple[TpmQuote, bytes]:
    log, work = tpm.directory / "log", tpm.directory / "work"
    return take_quote(tpm, event_log=str(log), directory=str(work))


def ek_of(quote: TpmQuote) -> bytes:
    return TpmKey.parse(quote.endorsement_key).sha256


def refused(
    quote: TpmQuote, nonce: bytes, vtpm: bytes | None, **more: dict[int, frozenset[bytes]]
) -> str:
    with pytest.raises(QuoteError) as error:
        verify_quote(quote, vtpm=vtpm, nonce=nonce, **more)
    return error.value.check


def replaced(quote: TpmQuote, **fields: bytes) -> TpmQuote:
    return msgspec.structs.replace(quote, **fields)


def test_quote_tells_what_booted(taken: tuple[TpmQuote, bytes]) -> None:
    quote, nonce = taken
    boot = verify_quote(quote, vtpm=ek_of(quote), nonce=nonce)
    assert boot.boot_loaders == (hashlib.sha256(b"GRUB's own").digest(),)
    assert boot.commands == ("linux /vmlinuz quiet", "/vmlinuz quiet")
    assert [event.sha256 for event in boot.files] == [hashlib.sha256(b"the kernel").digest()]
    reference = {pcr: frozenset((value, bytes(32))) for pcr, value in boot.pcrs.items()}
    assert verify_quote(quote, vtpm=ek_of(quote), nonce=nonce, reference=reference) == boot


def test_tpm2_checkquote_agrees(
    tpm: SoftTpm, taken: tuple[TpmQuote, bytes], tmp_path: Path
) -> None:
    quote, nonce = taken
    key = TpmKey.parse(quote.attestation_key).key
    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for name, data in (("pem", pem), ("message", quote.message), ("signature", quote.signature)):
        (tmp_path / name).write_bytes(data)
    check = "tpm2_checkquote -u {0}/pem -m {0}/message -s {0}/signature -g sha256 -q {1}"
    right, wrong = nonce.hex(), bytes(32).hex()
    assert tpm.run(check.format(tmp_path, right), 20, check=False).status == 0
    assert tpm.run(check.format(tmp_path, wrong), 20, check=False).status != 0


def test_the_key_is_the_one_that_the_tpm_says(tpm: SoftTpm, taken: tuple[TpmQuote, bytes]) -> None:
    quote, _ = taken
    tpm.run("tpm2_readpublic -c 0x81010001 -f der -o ek.der -n ek.name", 20)
    key = TpmKey.parse(quote.endorsement_key)
    assert key.sha256 == hashlib.sha256((tpm.directory / "ek.der").read_bytes()).digest()
    assert key.name == (tpm.directory / "ek.name").read_bytes()


def test_wrong_nonce(taken: tuple[TpmQuote, bytes]) -> None:
    quote, _ = taken
    assert refused(quote, bytes(32), ek_of(quote)) == "vtpm:nonce"


def test_quote_of_before(tpm: SoftTpm, taken: tuple[TpmQuote, bytes]) -> None:
    quote, _ = taken
    _, nonce = quote_of(tpm)
    assert refused(quote, nonce, ek_of(quote)) == "vtpm:nonce"


def test_another_tpm(other_tpm: SoftTpm, taken: tuple[TpmQuote, bytes]) -> None:
    quote, nonce = taken
    ek = other_tpm.run("tpm2_readpublic -c 0x81010001 -o ek >/dev/null; base64 -w 0 ek", 20)
    others = replaced(quote, endorsement_key=msgspec.convert(ek.output, bytes))
    assert ek_of(others) != ek_of(quote)
    assert refused(quote, nonce, ek_of(others)) == "vtpm:key"
    assert refused(others, nonce, ek_of(quote)) == "vtpm:key"
    assert refused(quote, nonce, None) == "vtpm:key"


def test_tpm_that_has_the_attestation_key_alone_cannot_answer(
    tpm: SoftTpm, other_tpm: SoftTpm, taken: tuple[TpmQuote, bytes]
) -> None:
    """It shows another's EK, whose digest the evidence has, and its own AK."""
    quote, _ = taken
    (other_tpm.directory / "log").write_bytes(b"")

    def stolen_identity(_own: TpmKey, attestation: TpmKey) -> Challenge:
        return make_credential(TpmKey.parse(quote.endorsement_key), attestation)

    work = other_tpm.directory / "work"
    with pytest.raises(VmError, match="TPM gave no quote"):
        take_quote(other_tpm, stolen_identity, event_log="log", directory=str(work))


def test_credential_is_for_one_attestation_key(tpm: SoftTpm) -> None:
    def for_another(endorsement: TpmKey, attestation: TpmKey) -> Challenge:
        area = bytearray(attestation.area)
        area[-1] ^= 1
        other = TpmKey(bytes(area), attestation.attributes, None, attestation.key)
        return make_credential(endorsement, other)

    with pytest.raises(VmError, match="integrity check failed"):
        take_quote(tpm, for_another, event_log="log", directory=str(tpm.directory / "work"))


@pytest.mark.parametrize("field", ["message", "signature"])
def test_any_flipped_bit_is_noticed(taken: tuple[TpmQuote, bytes], field: str) -> None:
    quote, nonce = taken
    data: bytes = getattr(quote, field)
    for bit in range(0, len(data) * 8, 5):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        check = refused(replaced(quote, **{field: bytes(changed)}), nonce, ek_of(quote))
        assert check == "vtpm:signature"


def test_key_that_did_not_sign(tpm: SoftTpm, taken: tuple[TpmQuote, bytes]) -> None:
    quote, nonce = taken
    other, _ = quote_of(tpm)
    assert other.attestation_key != quote.attestation_key
    mixed = replaced(quote, attestation_key=other.attestation_key)
    assert refused(mixed, nonce, ek_of(quote)) == "vtpm:signature"


def test_log_that_is_another(taken: tuple[TpmQuote, bytes]) -> None:
    quote, nonce = taken
    evil = LogEvent.of(9, EventKind.IPL, b"/vmlinuz\0", b"another kernel")
    for events in (
        [evil if event.pcr == 9 else event for event in BOOT],
        BOOT[:-1],
        (*BOOT, evil),
        (*BOOT[:1], BOOT[2], BOOT[1], *BOOT[3:]),
    ):
        changed = replaced(quote, event_log=encode_log(events))
        assert refused(changed, nonce, ek_of(quote)) == "vtpm:log"
    assert refused(replaced(quote, event_log=b"log"), nonce, ek_of(quote)) == "vtpm:log"


def test_reference_that_is_not_met(taken: tuple[TpmQuote, bytes]) -> None:
    quote, nonce = taken
    assert (
        refused(quote, nonce, ek_of(quote), reference={4: frozenset((bytes(32),))}) == "vtpm:pcr-4"
    )
    # A PCR that is not quoted cannot be vouched for.
    assert (
        refused(quote, nonce, ek_of(quote), reference={11: frozenset((bytes(32),))})
        == "vtpm:pcr-11"
    )


def test_quote_is_a_part_of_the_appraisal(
    platform: Platform, taken: tuple[TpmQuote, bytes], tmp_path: Path
) -> None:
    quote, nonce = taken
    vm = platform.vm(vtpm=ek_of(quote))
    token = platform.sign(platform.evidence(vm))
    boot = verify_quote(quote, vtpm=vm.vtpm, nonce=nonce)
    reference = platform.reference().with_boot(boot)
    assert Reference.decode(reference.encode()) == reference
    policy = dataclasses.replace(POLICY, vtpm=True, quote=True)
    asked = {
        "policy": policy,
        "reference": reference,
        "quote": quote.encode(),
        "quote_nonce": nonce,
    }

    appraisal = platform.appraise(token, **asked)
    assert appraisal.verdict is Verdict.AFFIRMING
    assert appraisal.checks[-1].reason.endswith("PCRs 0, 2, 3, 4, 6, 7, 8, 9 as in the reference")

    other_kernel = {**reference.pcrs, 9: frozenset((bytes(32),))}
    for changes, failed in (
        ({"quote": None}, "vtpm:quote"),
        ({"quote_nonce": bytes(32)}, "vtpm:nonce"),
        ({"quote": replaced(quote, event_log=b"").encode()}, "vtpm:log"),
        ({"quote": b"no quote"}, "vtpm:quote"),
        ({"reference": dataclasses.replace(reference, pcrs=other_kernel)}, "vtpm:pcr-9"),
    ):
        refusal = platform.appraise(token, **(asked | changes))
        assert [check.name for check in refusal.failed] == [failed]
    other = platform.sign(platform.evidence(platform.vm(vtpm=bytes(32))))
    assert [one.name for one in platform.appraise(other, **asked).failed] == ["vtpm:key"]
    without = [one.name for one in platform.appraise(platform.sign(), **asked).failed]
    assert without == ["vtpm", "vtpm:key"]


@pytest.mark.parametrize("selection", ["sha256:0,1,2,3", "sha256:16", "sha256:all"])
def test_quote_of_other_pcrs(tpm: SoftTpm, taken: tuple[TpmQuote, bytes], selection: str) -> None:
    """Whoever chooses what is quoted could leave out what tells."""
    quote, _ = taken
    tpm.run(
        "tpm2_createak -C 0x81010001 -c ak.ctx -G ecc -g sha256 -s ecdsa -u ak.pub;"
        f"tpm2_quote -c ak.ctx -l {selection} -g sha256 -q 00 -m other.m -s other.s",
        20,
    )
    names = {"attestation_key": "ak.pub", "message": "other.m", "signature": "other.s"}
    files = {field: (tpm.directory / name).read_bytes() for field, name in names.items()}
    assert refused(replaced(quote, **files), b"\0", ek_of(quote)) == "vtpm:pcrs"


@pytest.mark.parametrize("restricted", [True, False])
def test_rsa_and_a_key_that_signs_anything(tpm: SoftTpm, restricted: bool) -> None:
    """A key that is not restricted would sign what looks like a quote."""
    attributes = "sign|fixedtpm|fixedparent|sensitivedataorigin|userwithauth"
    make = {
        True: "tpm2_createak -C 0x81010001 -c k.ctx -G rsa -s rsassa -g sha256 -u k.pub",
        False: "tpm2_createprimary -C o -c p.ctx && tpm2_create -C p.ctx -G ecc:ecdsa -u k.pub"
        f" -r k.priv -c k.ctx -a '{attributes}'",
    }[restricted]
    pcrs = ",".join(map(str, QUOTED_PCRS))
    tpm.run(
        f"{make} && tpm2_flushcontext -t"
        f" && tpm2_quote -c k.ctx -l sha256:{pcrs} -g sha256 -q 0102 -m k.m -s k.s"
        " && tpm2_readpublic -c 0x81010001 -o k.ek",
        20,
    )
    names = ("k.ek", "k.pub", "k.m", "k.s", "log")
    ek, ak, message, signature, log = ((tpm.directory / name).read_bytes() for name in names)
    quote = TpmQuote(
        endorsement_key=ek, attestation_key=ak, message=message, signature=signature, event_log=log
    )
    if restricted:
        assert verify_quote(quote, vtpm=ek_of(quote), nonce=b"\1\2").pcrs
    else:
        assert refused(quote, b"\1\2", ek_of(quote)) == "vtpm:key"


def test_document(taken: tuple[TpmQuote, bytes]) -> None:
    quote, _ = taken
    assert TpmQuote.decode(quote.encode()) == quote
    for data in (
        b"",
        b"{}",
        b"[" * 100_000,
        b"\xff",
        msgspec.json.encode(quote).replace(b"mktme.quote", b"mktme.other"),
        b" " * (QUOTE_MAX_BYTES + 1),
    ):
        with pytest.raises(QuoteError):
            TpmQuote.decode(data)


# --- structures -------------------------------------------------------------------------------


def attested(**changes: bytes) -> bytes:
    parts = {
        "magic": b"\xffTCG\x80\x18",
        "signer": sized(b"name"),
        "qualifying": sized(b"nonce"),
        "clock": struct.pack(">QIIBQ", 1, 7, 0, 1, 2),
        "selection": bytes.fromhex("00000001 000b 03 ff0300"),
        "digest": sized(bytes(32)),
    }
    return b"".join((parts | changes).values())


def test_attested() -> None:
    assert Attested.parse(attested()) == Attested(b"nonce", 7, QUOTED_PCRS, bytes(32))


@pytest.mark.parametrize(
    "changes",
    [
        {"magic": b"\xffTCH\x80\x18"},
        {"magic": b"\xffTCG\x80\x17"},
        {"signer": sized(bytes(69))},
        {"qualifying": sized(bytes(65))},
        {"selection": bytes.fromhex("00000001 0004 03 ff0300")},
        {"selection": bytes.fromhex("00000002 000b 03 ff0300 0004 03 ff0300")},
        {"selection": bytes.fromhex("00000001 000b 04 ff030001")},
        {"digest": sized(bytes(32)) + b"\0"},
        {"digest": b""},
    ],
)
def test_what_is_not_attested(changes: dict[str, bytes]) -> None:
    with pytest.raises(TpmFormatError):
        Attested.parse(attested(**changes))


def test_keys_that_are_none(taken: tuple[TpmQuote, bytes]) -> None:
    quote, nonce = taken
    public = quote.attestation_key
    off_curve = public[:-1] + bytes([public[-1] ^ 1])
    name_hash = public[:4] + b"\0\4" + public[6:]
    for bad in (b"", public[:-1], public + b"\0", off_curve, name_hash, quote.message):
        with pytest.raises(TpmFormatError):
            TpmKey.parse(bad)
        assert refused(replaced(quote, attestation_key=bad), nonce, ek_of(quote)) == "vtpm:key"
    with pytest.raises(TpmFormatError, match="no attestation key"):
        make_credential(TpmKey.parse(quote.endorsement_key), TpmKey.parse(quote.endorsement_key))
    with pytest.raises(TpmFormatError, match="usual template"):
        make_credential(TpmKey.parse(public), TpmKey.parse(public))


def test_log_of_the_quote_is_what_was_read(taken: tuple[TpmQuote, bytes]) -> None:
    assert EventLog.parse(taken[0].event_log) == EventLog.parse(encode_log(BOOT))
