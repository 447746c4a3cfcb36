# SPDX-License-Identifier: GPL-2.0-or-later
"""policy.toml and reference.json: what they say, and the errors of people who write them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from mktme.attest.claims import ExceptionKind, KeySource
from mktme.attest.errors import PolicyError, ReferenceValuesError
from mktme.attest.policy import Policy
from mktme.attest.reference import Reference
from mktme.engine.keys import KeyMode

from .signing import Platform


def test_an_empty_policy_is_the_strict_one() -> None:
    policy = Policy.decode(b"")
    assert policy == Policy()
    assert policy.integrity
    assert not policy.debug
    assert not policy.exclusion_range
    assert not policy.exceptions
    assert KeySource.FILE not in policy.key_sources
    assert policy.data_paths == {"inline"}


def test_the_documented_policy_has_every_setting_and_its_default() -> None:
    path = Path(__file__).parents[3] / "docs/attestation/policy.toml"
    assert Policy.load(path) == Policy()
    settings = {name.replace("_", "-") for name in Policy.__slots__}
    assert tomllib.loads(path.read_text()).keys() == settings


def test_every_setting_is_read() -> None:
    policy = Policy.decode(
        b"""
        name = "tenant a"
        key-size = 256
        key-modes = ["direct"]
        key-sources = ["broker", "file"]
        data-paths = ["shadow"]
        integrity = false
        exceptions = ["shared"]
        exceptions-max = 4096
        exclusion-range = true
        debug = true
        vtpm = true
        lifetime-s = 5
        clock-skew-s = 0
        """
    )
    assert policy == Policy(
        name="tenant a",
        key_size=256,
        key_modes=frozenset({KeyMode.DIRECT}),
        key_sources=frozenset({KeySource.BROKER, KeySource.FILE}),
        data_paths=frozenset({"shadow"}),
        integrity=False,
        exceptions=frozenset({ExceptionKind.SHARED}),
        exceptions_max=4096,
        exclusion_range=True,
        debug=True,
        vtpm=True,
        lifetime_s=5,
        clock_skew_s=0,
    )


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("key-sise = 128", "key-sise", "did you mean key-size?"),
        ("Integrity = true", "Integrity", "did you mean integrity?"),
        ("key-size = 192", "key-size", "128, 256"),
        ("key-size = true", "key-size", "128, 256"),
        ("key-size = 128.0", "key-size", "128, 256"),
        ("key-modes = 'random'", "key-modes", "an array"),
        ("key-modes = ['platform']", "key-modes", "random, direct"),
        ("key-sources = ['brokr']", "key-sources", "did you mean broker?"),
        ("key-sources = [1]", "key-sources", "an array"),
        ("data-paths = ['in-line']", "data-paths", "did you mean inline?"),
        ("integrity = 1", "integrity", "true, false"),
        ("debug = 'off'", "debug", "true, false"),
        ("lifetime-s = -1", "lifetime-s", "0 to"),
        ("lifetime-s = true", "lifetime-s", "0 to"),
        ("exceptions-max = '4K'", "exceptions-max", "0 to"),
        ("name = ''", "name", "printable"),
        ('name = "a\\nb"', "name", "printable"),
        ("[integrity]\nrequired = true", "integrity", "true, false"),
    ],
)
def test_a_wrong_setting_is_named(text: str, key: str, hint: str) -> None:
    with pytest.raises(PolicyError) as refused:
        Policy.decode(text.encode())
    assert refused.value.key == key
    assert hint in str(refused.value.hint)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("data", [b"= 1", b"\xff", b"a = [" * 5000, b"#" * 70_000, b"debug"])
def test_what_is_no_policy_is_refused(data: bytes) -> None:
    with pytest.raises(PolicyError) as refused:
        Policy.decode(data)
    assert str(refused.value).isprintable()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file"):
        Policy.load(tmp_path / "policy.toml")
    with pytest.raises(ReferenceValuesError, match="No such file"):
        Reference.load(tmp_path / "reference.json")


def test_reference_values_come_back(platform: Platform, tmp_path: Path) -> None:
    reference = platform.reference()
    path = tmp_path / "reference.json"
    path.write_bytes(reference.encode())
    assert Reference.load(path) == reference
    lax = reference.accepting_any(["kernel"])
    assert Reference.decode(lax.encode()) == lax
    assert lax.launch["kernel"] is None
    with pytest.raises(ReferenceValuesError, match="no component"):
        reference.accepting_any(["kernle"])


def test_of_two_references_each_digest_is_good(platform: Platform) -> None:
    other = Reference(frozenset({b"\x77" * 32}), {"kernel": frozenset({b"\x78" * 32})})
    both = platform.reference().also(other)
    assert both.code == {b"\x33" * 32, b"\x77" * 32}
    assert both.launch == {
        "kernel": frozenset({b"\x22" * 32, b"\x78" * 32}),
        "command-line": frozenset({b"\x11" * 32}),
    }
    assert both.accepting_any(["kernel"]).also(other).launch["kernel"] is None


def test_a_component_that_may_be_anything(platform: Platform) -> None:
    nothing = Reference(frozenset({b"\x33" * 32}), {"kernel": None, "command-line": None})
    assert not platform.appraise(platform.sign(), reference=nothing).failed
    missing = Reference(nothing.code, {**nothing.launch, "initrd": None})
    failed = platform.appraise(platform.sign(), reference=missing).failed
    assert [check.name for check in failed] == ["launch:initrd"]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b"\xff", b"[" * 100_000,
        b'{"schema":"mktme.reference","version":2,"code":[],"launch":{}}',
        b'{"schema":"mktme.reference","version":1,"code":["00"],"launch":{}}',
        b'{"schema":"mktme.reference","version":1,"code":[],"launch":{"kernel":"all"}}',
        b'{"schema":"mktme.reference","version":1,"code":[],"launch":{},"more":1}',
    ],
)  # fmt: skip
def test_what_are_no_reference_values_is_refused(data: bytes) -> None:
    with pytest.raises(ReferenceValuesError) as refused:
        Reference.decode(data)
    assert str(refused.value).isprintable()
