# SPDX-License-Identifier: GPL-2.0-or-later
"""Opening a JWE: RFC 7518's example, what joserfc seals, and what must not be opened."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from joserfc import jwe as joserfc_jwe
from joserfc.jwk import ECKey

from mktme.attest.errors import JweError
from mktme.attest.jwe import concat_kdf, open_jwe
from mktme.engine.secret import scrub

SECRET = bytes(range(64))
ALGORITHMS = ("ECDH-ES", "ECDH-ES+A256KW")


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def seal(
    key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey,
    algorithm: str = "ECDH-ES+A256KW",
    secret: bytes = SECRET,
    **header: Any,
) -> str:
    """A compact JWE as an independent library makes it."""
    half = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key
    numbers = half.public_numbers()
    public = ECKey.import_key(
        {
            "kty": "EC",
            "crv": "P-256",
            "x": b64(numbers.x.to_bytes(32, "big")),
            "y": b64(numbers.y.to_bytes(32, "big")),
        }
    )
    protected = {"alg": algorithm, "enc": "A256GCM", **header}
    registry = joserfc_jwe.JWERegistry(algorithms=[algorithm, protected["enc"], "DEF"])
    return joserfc_jwe.encrypt_compact(protected, secret, public, registry=registry)


def flattened(compact: str, **changes: str) -> bytes:
    names = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
    parts = dict(zip(names, compact.split("."), strict=True)) | changes
    return json.dumps(parts).encode()


def with_header(compact: str, **changes: Any) -> bytes:
    """The same with another header, whose tag then is wrong; what is refused is so before."""
    head, *rest = compact.split(".")
    header = json.loads(unb64(head)) | changes
    return ".".join((b64(json.dumps(header).encode()), *rest)).encode()


def test_rfc_7518_appendix_c() -> None:
    alice = ec.EllipticCurvePrivateNumbers(
        int.from_bytes(unb64("0_NxaRPUMQoAJt50Gz8YiTr8gRTwyEaCumd-MToTmIo"), "big"),
        ec.EllipticCurvePublicNumbers(
            int.from_bytes(unb64("gI0GAILBdu7T53akrFmMyGcsF3n5dO7MmwNBHKW5SV0"), "big"),
            int.from_bytes(unb64("SLW_xSffzlPWrHEVI30DHM_4egVwt3NQqeUD7nMFpps"), "big"),
            ec.SECP256R1(),
        ),
    ).private_key()
    bob = ec.EllipticCurvePublicNumbers(
        int.from_bytes(unb64("weNJy2HscCSM6AEDTDg04biOvhFhyyWvOHQfeF_PxMQ"), "big"),
        int.from_bytes(unb64("e8lnCO-AlStT-NJVX-crhB7QRYhiix03illJOVAOyck"), "big"),
        ec.SECP256R1(),
    ).public_key()
    out = bytearray(16)
    concat_kdf(alice.exchange(ec.ECDH(), bob), "A128GCM", b"Alice", b"Bob", memoryview(out))
    assert b64(bytes(out)) == "VqqN6vgjbSBcIijNcacQGg"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_another_library_sealed_is_opened(
    key: ec.EllipticCurvePrivateKey, algorithm: str
) -> None:
    compact = seal(key, algorithm)
    for data in (compact.encode(), flattened(compact)):
        with open_jwe(data, key, len(SECRET)) as secret:
            assert secret.view == SECRET


def test_both_parties_names_count(key: ec.EllipticCurvePrivateKey) -> None:
    compact = seal(key, apu=b64(b"broker"), apv=b64(b"engine"))
    with open_jwe(compact.encode(), key, len(SECRET)) as secret:
        assert secret.view == SECRET
    with pytest.raises(JweError, match="not for this key"):
        open_jwe(with_header(compact, apu=b64(b"another")), key, len(SECRET))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_is_for_one_key(key: ec.EllipticCurvePrivateKey, algorithm: str) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(JweError, match="not for this key"):
        open_jwe(seal(other, algorithm).encode(), key, len(SECRET))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_part_is_authentic(key: ec.EllipticCurvePrivateKey, algorithm: str) -> None:
    compact = seal(key, algorithm)
    parts = compact.split(".")
    for index, part in enumerate(parts):
        if not part:
            continue
        data = bytearray(unb64(part))
        data[len(data) // 2] ^= 1
        changed = [*parts[:index], b64(bytes(data)), *parts[index + 1 :]]
        with pytest.raises(JweError):
            open_jwe(".".join(changed).encode(), key, len(SECRET))


@pytest.mark.parametrize("size", [1, 63, 65])
def test_another_size_is_refused(key: ec.EllipticCurvePrivateKey, size: int) -> None:
    with pytest.raises(JweError, match="bytes"):
        open_jwe(seal(key).encode(), key, size)


POINT = {"kty": "EC", "crv": "P-256", "x": b64(bytes(31) + b"\x05"), "y": b64(bytes(31) + b"\x01")}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"alg": "dir"}, "it is not ECDH-ES"),
        ({"alg": "ECDH-ES+A128KW"}, "it is not ECDH-ES"),
        ({"enc": "A128GCM"}, "with A256GCM"),
        ({"enc": "A256CBC-HS512"}, "with A256GCM"),
        ({"alg": "ECDH-ES"}, "not its length"),
        ({"crit": ["exp"]}, "critical"),
        ({"zip": "DEF"}, "compressed"),
        ({"epk": POINT}, "not on P-256"),
        ({"epk": POINT | {"crv": "P-384"}}, "not on P-256"),
        ({"epk": POINT | {"x": ""}}, "not on P-256"),
        ({"epk": {}}, "no JWE"),
        ({"epk": 5}, "no JWE"),
    ],
)
def test_what_is_not_in_the_table_is_refused(
    key: ec.EllipticCurvePrivateKey, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(JweError, match=why):
        open_jwe(with_header(seal(key), **changes), key, len(SECRET))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"....", b"{}", b"a.b.c", b"\xff.\xff.\xff.\xff.\xff", b"{" * 10_000, b"x" * 20_000,
        b'{"protected": 5}', b"e30.e30.e30.e30.e30",
    ],
)  # fmt: skip
def test_what_is_none_is_refused(key: ec.EllipticCurvePrivateKey, data: bytes) -> None:
    with pytest.raises(JweError) as refused:
        open_jwe(data, key, len(SECRET))
    assert str(refused.value).isprintable()


def test_base64url_has_one_form(key: ec.EllipticCurvePrivateKey) -> None:
    head, wrapped, iv, ciphertext, tag = seal(key).split(".")
    for changed in (tag + "==", tag[:-1] + chr(ord(tag[-1]) + 1), tag + "\n"):
        with pytest.raises(JweError):
            open_jwe(".".join((head, wrapped, iv, ciphertext, changed)).encode(), key, 64)


def test_scrub_overwrites_what_cannot_be_written_to() -> None:
    secret = bytes(bytearray(b"a secret of its own"))
    scrub(secret)
    assert secret == bytes(len(secret))
    with pytest.raises(ValueError, match="2 bytes"):
        scrub(b"x")
