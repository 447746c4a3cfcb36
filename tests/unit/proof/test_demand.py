# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run takes of its platform: refused in time, with what would do."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mktme.engine.firmware import PlatformConfig
from mktme.engine.xts import Algorithm
from mktme.proof import runs
from mktme.proof.demand import Demand, demo_demand, mib, run_demand
from mktme.proof.runs import RunOptions
from mktme.service.platform_file import read_platform
from mktme.vm.config import VmConfig
from mktme.vm.host import UsageError
from mktme.vm.pages import parse_pages

from ..vm.test_domain_xml import IMAGE

MIB = 1 << 20
XTS_128, XTS_256 = Algorithm.AES_XTS_128, Algorithm.AES_XTS_256
TWO = Demand(guests=2, memory_bytes=193 * MIB, algorithm=XTS_128, keyids=3)


# --- how much it is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "keyids"),
    [
        ("", 1),
        ("16M@0=shared 16M@16M=private", 1),
        ("16M@0=no-encrypt", 2),
        ("16M@0=other-key 16M@16M=other-key 16M@32M=no-encrypt 4K@64M=shared", 4),
    ],
)
@pytest.mark.parametrize("guests", [1, 3])
def test_run_takes_a_keyid_for_each_guest_and_each_kind_of_its_pages(
    pages: str, keyids: int, guests: int
) -> None:
    ranges = [parse_pages(one) for one in pages.split()]
    assert run_demand(192 * MIB, XTS_256, ranges, guests) == Demand(
        guests, 192 * MIB, XTS_256, guests * keyids
    )


def test_demo_takes_two_guests_at_a_time_and_a_keyid_for_a_control() -> None:
    assert demo_demand(512 * MIB, XTS_256) == Demand(2, 512 * MIB, XTS_256, 3)


def test_dram_is_taken_in_regions() -> None:
    assert TWO.dram_bytes == 2 * 194 * MIB


# --- what is enough ---------------------------------------------------------------------------

ENOUGH: dict[str, PlatformConfig | None] = {
    "one made for it": None,
    "default": PlatformConfig(),
    "just the DRAM": PlatformConfig(dram=388 * MIB),
    "just the KeyIDs": PlatformConfig(keyid_bits=2),
    "just the algorithm": PlatformConfig(algorithms=(XTS_128,)),
    "just the addresses": PlatformConfig(physical_address_bits=32, keyid_bits=3),
}


@pytest.mark.parametrize("platform", ENOUGH.values(), ids=ENOUGH)
def test_platform_that_has_it(platform: PlatformConfig | None) -> None:
    TWO.check(platform)


# --- what is not ------------------------------------------------------------------------------

REFUSED: dict[str, tuple[PlatformConfig, Demand, str, str]] = {
    "no KeyIDs": (
        PlatformConfig(keyid_bits=0),
        TWO,
        "the platform has no KeyIDs for guests",
        "tme = true and keyid-bits = 6 in platform.toml",
    ),
    "no TME": (
        PlatformConfig(tme=False, keyid_bits=0),
        TWO,
        "the platform has no KeyIDs for guests",
        "tme = true and keyid-bits = 6 in platform.toml",
    ),
    "too few KeyIDs": (
        PlatformConfig(keyid_bits=1),
        TWO,
        "the platform's 1 KeyIDs are too few: the run takes 3",
        "keyid-bits = 2 or more in platform.toml",
    ),
    "a KeyID short": (
        PlatformConfig(keyid_bits=2),
        dataclasses.replace(TWO, keyids=4),
        "the platform's 3 KeyIDs are too few: the run takes 4",
        "keyid-bits = 3 or more in platform.toml",
    ),
    "algorithm not allowed": (
        PlatformConfig(algorithms=(XTS_256,)),
        TWO,
        "the platform's algorithms do not include aes-xts-128",
        "--algorithm aes-xts-256",
    ),
    "a page of DRAM short": (
        PlatformConfig(dram=388 * MIB - 4096),
        TWO,
        "the platform has 397308 KiB of DRAM and the guests take 388 MiB",
        'dram = "388M" in platform.toml, or less --memory',
    ),
    "addresses too short": (
        PlatformConfig(physical_address_bits=32, keyid_bits=4),
        TWO,
        "the platform's addresses reach 256 MiB and the guests take 388 MiB",
        "more physical-address-bits in platform.toml, or fewer keyid-bits",
    ),
    "addresses far too short": (
        PlatformConfig(physical_address_bits=32, keyid_bits=15, dram=4096),
        TWO,
        "the platform's addresses reach 128 KiB and the guests take 388 MiB",
        "more physical-address-bits in platform.toml, or fewer keyid-bits",
    ),
}


@pytest.mark.parametrize(("platform", "demand", "message", "hint"), REFUSED.values(), ids=REFUSED)
def test_platform_that_lacks_it(
    platform: PlatformConfig, demand: Demand, message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        demand.check(platform)
    assert (str(caught.value), caught.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("toml", "demand"),
    [
        ("keyid-bits = 1", TWO),
        ("keyid-bits = 0", TWO),
        ("tme = false\nkeyid-bits = 0", TWO),
        ('dram = "1M"', TWO),
        ("keyid-bits = 5", dataclasses.replace(TWO, keyids=32)),
    ],
)
def test_hint_is_what_does(tmp_path: Path, toml: str, demand: Demand) -> None:
    """Each setting of a hint, put in place of its own kind, makes a platform that has it."""
    file = tmp_path / "platform.toml"
    file.write_text(toml)
    with pytest.raises(UsageError) as caught:
        demand.check(read_platform(file))
    words = shlex.split(str(caught.value.hint), posix=False)
    settings = dict(line.split(" = ") for line in toml.splitlines())
    settings |= {
        words[at - 1]: words[at + 1].rstrip(",") for at, word in enumerate(words) if word == "="
    }
    file.write_text("\n".join(f"{key} = {value}" for key, value in settings.items()))
    demand.check(read_platform(file))


@given(st.integers(1, 1 << 14), st.integers(1, 15))
def test_keyids_are_enough_or_the_hint_is_the_least_that_are(keyids: int, bits: int) -> None:
    demand = dataclasses.replace(TWO, keyids=keyids)
    try:
        demand.check(PlatformConfig(keyid_bits=bits))
    except UsageError as error:
        least = int(str(error.hint).split()[2])
    else:
        assert keyids < 1 << bits
        return
    assert bits < least
    assert keyids < 1 << least
    assert keyids >= 1 << least - 1


def test_sizes_are_told_as_they_are() -> None:
    assert [mib(size) for size in (0, 4096, MIB, MIB + 4096, 3 << 30)] == [
        "0 MiB",
        "4 KiB",
        "1 MiB",
        "1028 KiB",
        "3072 MiB",
    ]


# --- before anything is started ---------------------------------------------------------------


class NoNarrator:
    """A narrator with nothing to tell."""

    def step(self, what: str) -> None:
        raise AssertionError(f"{what} is begun")

    notice = step


COMMANDS: dict[str, Callable[..., object]] = {
    "run": lambda config, narrator, options: runs.run(config, narrator, options=options),
    "demo": runs.demo,
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_run_is_refused_before_its_first_step(command: Callable[..., object]) -> None:
    config = VmConfig(IMAGE, memory_bytes=192 * MIB)
    with pytest.raises(UsageError, match="1 MiB of DRAM and the guests take"):
        command(config, NoNarrator(), RunOptions(platform=PlatformConfig(dram=MIB)))
    with pytest.raises(AssertionError, match="starting the engine and libvirt is begun"):
        command(config, NoNarrator(), RunOptions(platform=PlatformConfig()))  # control
