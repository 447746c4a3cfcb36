# SPDX-License-Identifier: GPL-2.0-or-later
"""Which guests can see the platform's memory encryption, and on which platform."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mktme.engine.firmware import PlatformConfig
from mktme.vm.config import VmConfig, check_config
from mktme.vm.domain import Domain
from mktme.vm.hardware import Hardware, Machine
from mktme.vm.host import EnvironmentUnfitError, Host, UsageError
from mktme.vm.visible import (
    ADDRESS_BITS,
    check_processor,
    check_visible,
    require_visible,
    visible_platform,
)

from .test_domain_xml import IMAGE

GIB = 1 << 30
CONFIG = VmConfig(IMAGE, visible=True)
GOOD = {"vendor": "GenuineIntel", "phys-bits": ADDRESS_BITS}


def platform(**fields: Any) -> PlatformConfig:
    return PlatformConfig(**{"physical_address_bits": 40} | fields)


def of_memory(memory_bytes: int, **fields: Any) -> VmConfig:
    return dataclasses.replace(CONFIG, memory_bytes=memory_bytes, **fields)


def test_usual_platform_has_the_processors_address_bits() -> None:
    assert visible_platform(None) == PlatformConfig(physical_address_bits=40)
    file = PlatformConfig(physical_address_bits=39)
    assert visible_platform(file) is file  # whatever it says is checked, not changed


def test_platform_of_other_address_bits_is_refused() -> None:
    check_visible(CONFIG, platform())
    for bits in (39, 41, 46, 52):
        with pytest.raises(UsageError, match=f"{bits} physical address bits") as refused:
            check_visible(CONFIG, PlatformConfig(physical_address_bits=bits))
        assert refused.value.hint == "physical-address-bits = 40 in platform.toml"


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (of_memory(GIB), 8),  # devices are below 4 GiB
        (of_memory(2 * GIB), 8),
        (of_memory(3 * GIB), 7),  # 1 GiB of it is above
        (of_memory(3 * GIB, hardware=Hardware(Machine.PC)), 8),
        (of_memory(6 * GIB), 7),  # up to exactly 8 GiB
        (of_memory(6 * GIB + (1 << 20)), 6),
        (of_memory(GIB, dimms=(128 << 20,)), 7),
        (of_memory(GIB, dimms=(3 * GIB, GIB)), 7),
        (of_memory(GIB, dimms=(4 * GIB, GIB)), 6),
    ],
)
def test_keyid_bits_leave_room_for_memory(config: VmConfig, most: int) -> None:
    check_visible(config, platform(keyid_bits=most))
    with pytest.raises(UsageError, match=f"{most + 1} KeyID bits of 40 leave the guest") as refused:
        check_visible(config, platform(keyid_bits=most + 1))
    assert refused.value.hint == f"keyid-bits = {most} or fewer in platform.toml"


def test_plain_guest_sees_no_platform() -> None:
    check_config(CONFIG)
    with pytest.raises(UsageError, match="a plain guest has no platform to see"):
        check_config(dataclasses.replace(CONFIG, track=None))


@pytest.mark.parametrize(("api", "version"), [(4, (10, 0, 2)), (7, (11, 1, 2))])
def test_qemu_needs_the_interface(api: int, version: tuple[int, ...]) -> None:
    host = cast("Host", SimpleNamespace(plugin_api=api, qemu_version=version))
    if api >= 7:
        require_visible(host)
        return
    with pytest.raises(EnvironmentUnfitError, match=r"QEMU 10\.0\.2 does not let a plugin") as no:
        require_visible(host)
    assert no.value.hint == "make qemu11, and --emulator qemu11"


def processor(properties: dict[str, object]) -> Domain:
    def qmp(command: str, **arguments: Any) -> object:
        if command == "query-cpus-fast":
            return [{"qom-path": "/cpu"}]
        assert (command, arguments["path"]) == ("qom-get", "/cpu")
        return properties[arguments["property"]]

    return cast("Domain", SimpleNamespace(qmp=qmp))


def test_processor_must_be_intels() -> None:
    check_processor(processor(GOOD))
    for vendor in ("AuthenticAMD", "HygonGenuine", "VIA VIA VIA "):
        with pytest.raises(UsageError, match=f"{vendor}'s, and TME is Intel's"):
            check_processor(processor(GOOD | {"vendor": vendor}))
    with pytest.raises(UsageError, match="has 36 physical address bits"):
        check_processor(processor(GOOD | {"phys-bits": 36}))
