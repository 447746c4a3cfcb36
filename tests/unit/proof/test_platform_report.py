# SPDX-License-Identifier: GPL-2.0-or-later
"""What is told of a platform is what its registers hold once its firmware has run."""

from __future__ import annotations

import errno

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.engine import rng
from mktme.engine.firmware import Exclusion, FirmwareError, PlatformConfig, PlatformConfigError
from mktme.engine.keys import KeyTable
from mktme.engine.tme import MSR_NAMES, Revision, TmeActivate, can_be_policy
from mktme.engine.xts import PAGE_BYTES, Algorithm
from mktme.proof import platform_report
from mktme.proof.platform_report import (
    Encryption,
    ExcludedRange,
    PlatformReport,
    Register,
    describe,
)

MIB = 1 << 20


@st.composite
def exclusions(draw: st.DrawFn, address_bits: int) -> Exclusion:
    size_bits = draw(st.integers(12, address_bits))
    base = draw(st.integers(0, (1 << address_bits - size_bits) - 1)) << size_bits
    return Exclusion(base=base, size_bytes=1 << size_bits)


@st.composite
def platforms(draw: st.DrawFn) -> PlatformConfig:
    tme = draw(st.booleans())
    revision = draw(st.sampled_from(Revision))
    address_bits = draw(st.integers(32, 52))
    return PlatformConfig(
        dram=draw(st.none() | st.integers(1, 1 << 17 - 12).map(lambda pages: pages * PAGE_BYTES)),
        physical_address_bits=address_bits,
        tme=tme,
        policy=draw(st.sampled_from([one for one in Algorithm if can_be_policy(one, revision)])),
        bypass=draw(st.booleans()),
        save_key_for_standby=draw(st.booleans()),
        exclusion=draw(st.none() | exclusions(address_bits)),
        keyid_bits=draw(st.integers(0, 15)) if tme else 0,
        algorithms=tuple(draw(st.sets(st.sampled_from(Algorithm), min_size=1))),
        revision=revision,
    )


def register(report: PlatformReport, name: str) -> Register:
    return next(one for one in report.registers if one.name == name)


def told(report: PlatformReport, name: str) -> dict[str, tuple[str, int, str]]:
    """A register's fields: where, value and meaning by name."""
    fields = register(report, name).fields
    return {field.name: (field.bits, field.value, field.meaning) for field in fields}


@given(platforms())
def test_report_is_the_platform(config: PlatformConfig) -> None:
    report = describe(config)
    assert report.dram_bytes == config.dram
    assert report.revision is config.revision
    assert report.physical_address_bits == config.physical_address_bits
    assert report.keyid_bits == config.keyid_bits
    assert report.address_bits == config.physical_address_bits - config.keyid_bits
    assert report.keyids == (1 << config.keyid_bits) - 1
    assert set(report.algorithms) == (set(config.algorithms) if config.keyid_bits else set())
    if not config.tme:
        assert (report.encryption, report.policy) == (Encryption.OFF, None)
    else:
        assert report.encryption is (Encryption.BYPASSED if config.bypass else Encryption.ON)
        assert report.policy is config.policy
    assert report.save_key_for_standby is (config.tme and config.save_key_for_standby)
    assert report.exclusion == (
        config.exclusion and ExcludedRange(config.exclusion.base, config.exclusion.size_bytes)
    )


@given(platforms())
def test_fields_are_their_bits_of_the_value(config: PlatformConfig) -> None:
    """The fields' values, put where they say, are the register: nothing is left out or moved."""
    for one in describe(config).registers:
        value = 0
        for field in one.fields:
            high, _, low = field.bits.partition(":")
            width = int(high) - int(low or high) + 1
            assert field.value < 1 << width
            value |= field.value << int(low or high)
        assert f"{value:#018x}" == one.value


@given(platforms())
def test_fields_of_activate_are_what_the_model_takes_them_for(config: PlatformConfig) -> None:
    report = describe(config)
    model = TmeActivate.decode(int(register(report, "IA32_TME_ACTIVATE").value, 16))
    fields = {name: value for name, (_, value, _) in told(report, "IA32_TME_ACTIVATE").items()}
    assert fields.pop("TDX KeyID bits", 0) == model.tdx_keyid_bits
    assert fields == {
        "lock": model.lock,
        "TME": model.enable,
        "key select": model.restore_key,
        "save key": model.save_key,
        "policy": model.policy,
        "bypass": model.bypass,
        "KeyID bits": model.keyid_bits,
        "algorithms": model.algorithms,
    }


def test_registers_in_words() -> None:
    """Bits from Intel 336907-004, tables 4-1 to 4-6, and SDM vol. 4."""
    config = PlatformConfig(
        physical_address_bits=40,
        policy=Algorithm.AES_XTS_256,
        bypass=True,
        save_key_for_standby=True,
        exclusion=Exclusion(base=16 * MIB, size_bytes=MIB),
        keyid_bits=4,
        algorithms=(Algorithm.AES_XTS_256,),
    )
    report = describe(config)
    assert [one.name for one in report.registers] == list(MSR_NAMES.values())
    assert [one.msr for one in report.registers] == [
        *("0x87", "0x981", "0x982", "0x983", "0x984", "0x9ff")
    ]
    assert told(report, "IA32_TME_ACTIVATE") == {
        "lock": ("0", 1, "locked until reset"),
        "TME": ("1", 1, "enabled"),
        "key select": ("2", 0, "a new TME key"),
        "save key": ("3", 1, "kept for standby"),
        "policy": ("7:4", 2, "aes-xts-256"),
        "bypass": ("31", 1, "KeyID 0 is plaintext"),
        "KeyID bits": ("35:32", 4, "4"),
        "TDX KeyID bits": ("39:36", 0, "0"),
        "algorithms": ("63:48", 4, "aes-xts-256"),
    }
    assert told(report, "IA32_TME_CAPABILITY") == {
        "algorithms": ("3:0", 7, "aes-xts-128, aes-xts-128-integrity, aes-xts-256"),
        "bypass": ("31", 1, "possible"),
        "most KeyID bits": ("35:32", 15, "15"),
        "most keys": ("50:36", 32767, "32767"),
    }
    assert told(report, "IA32_MKTME_KEYID_PARTITIONING") == {
        "KeyIDs of MKTME": ("31:0", 15, "15"),
        "KeyIDs of TDX": ("63:32", 0, "0"),
    }
    assert told(report, "IA32_TME_EXCLUDE_MASK") == {
        "exclusion": ("11", 1, "enabled"),
        "mask": ("39:12", 0xFFFFF00, "0xfffff00000"),
    }
    assert told(report, "IA32_TME_EXCLUDE_BASE") == {"base": ("39:12", 0x1000, "0x1000000")}
    assert told(report, "MK_TME_CORE_ACTIVATE") == {"KeyID bits": ("35:32", 4, "4")}


def test_platform_without_encryption_in_words() -> None:
    report = describe(PlatformConfig(tme=False, keyid_bits=0))
    fields = told(report, "IA32_TME_ACTIVATE")
    assert fields["lock"] == ("0", 1, "locked until reset")
    assert fields["TME"] == ("1", 0, "disabled")
    assert fields["bypass"] == ("31", 0, "off")
    assert fields["save key"] == ("3", 0, "lost in standby")
    assert fields["algorithms"] == ("63:48", 0, "none")
    assert told(report, "IA32_TME_EXCLUDE_MASK")["exclusion"] == ("11", 0, "disabled")


def test_bits_that_the_specification_reserves_are_no_field() -> None:
    by_sdm, by_specification = (
        told(describe(PlatformConfig(revision=revision)), "IA32_TME_ACTIVATE")
        for revision in (Revision.SDM, Revision.SPEC_1_4)
    )
    assert by_sdm.keys() - by_specification.keys() == {"TDX KeyID bits"}


def test_document_survives_json() -> None:
    report = describe(PlatformConfig(exclusion=Exclusion(base=0, size_bytes=MIB)), "a file")
    document = msgspec.json.encode(report)
    assert msgspec.json.decode(document, type=PlatformReport) == report


def test_no_key_is_left_when_a_platform_was_described(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = []

    class Watched(KeyTable):
        def __init__(self) -> None:
            super().__init__()
            tables.append(self)
            self.had_key = False

        def activate(self, keyid_bits: int, *, bypass: bool = False) -> None:
            super().activate(keyid_bits, bypass=bypass)
            self.had_key = self.cipher(0) is not None

    monkeypatch.setattr(platform_report, "KeyTable", Watched)
    describe(PlatformConfig(save_key_for_standby=True))
    (table,) = tables
    assert table.had_key  # control
    assert table.cipher(0) is None
    assert not table.restore_tme_key(Algorithm.AES_XTS_128)  # nor one that was saved


def test_platform_that_gets_no_key_is_not_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_into(_self: object, _buffer: memoryview) -> None:
        raise OSError(errno.EAGAIN, "too early")

    describe(PlatformConfig())  # control
    monkeypatch.setattr(rng.KernelEntropy, "read_into", read_into)
    with pytest.raises(FirmwareError):
        describe(PlatformConfig())
    assert describe(PlatformConfig(tme=False, keyid_bits=0)).encryption is Encryption.OFF


def test_what_no_platform_can_be_is_not_described() -> None:
    with pytest.raises(PlatformConfigError):
        describe(PlatformConfig(tme=False))
