# SPDX-License-Identifier: GPL-2.0-or-later
"""The doctor: each thing that can be wrong is found, with the command that mends it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from mktme.datapath.uffd import FaultServiceError, WriteTrackingError
from mktme.engine.errors import MktmeError
from mktme.vm import doctor, images
from mktme.vm.doctor import DoctorReport, Finding, examine
from mktme.vm.host import EnvironmentUnfitError, Host
from mktme.vm.images import ImageError

from .test_domain_xml import IMAGE

CHECKS = {
    "_libvirt": "libvirt and QEMU",
    "_plugin": "QEMU plugin",
    "_qemu11": "QEMU 11 (optional)",
    "_userfaultfd": "userfaultfd",
    "_pagemap_scan": "PAGEMAP_SCAN",
    "_inline": "inline data path",
    "_vtpm": "vTPM",
    "_image": "guest image",
    "_memory": "memory",
    "_disk": "disk",
    "_openssl": "openssl (bench)",
}


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which all is well."""
    for check in CHECKS:
        monkeypatch.setattr(doctor, check, lambda: "as it should be")


def raising(error: Exception) -> Callable[..., str]:
    def check(*_arguments: object) -> str:
        raise error

    return check


@pytest.mark.usefixtures("fit")
def test_everything_is_looked_at() -> None:
    assert examine() == [Finding(name, True, "as it should be") for name in CHECKS.values()]


@pytest.mark.usefixtures("fit")
@pytest.mark.parametrize("check", CHECKS)
def test_one_fault_does_not_hide_the_others(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = MktmeError("it is broken", hint="mend it")
    monkeypatch.setattr(doctor, check, raising(fault))
    findings = {finding.name: finding for finding in examine()}
    assert list(findings) == list(CHECKS.values())
    assert findings.pop(CHECKS[check]) == Finding(CHECKS[check], False, "it is broken", "mend it")
    assert all(finding.fit for finding in findings.values())


def test_libvirt_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    unfit = EnvironmentUnfitError("libvirt at qemu:///embed: no", hint="mktme doctor")
    monkeypatch.setattr(Host, "__enter__", raising(unfit))
    with pytest.raises(EnvironmentUnfitError, match="no") as caught:
        doctor._libvirt()
    assert caught.value.hint == "make setup"  # not the doctor again


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Replaces QEMU by a script."""
    path = tmp_path / "qemu"

    def replace(script: str) -> None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    monkeypatch.setattr(doctor, "EMULATOR", path)
    monkeypatch.setattr(doctor, "emulator_path", lambda _chosen: path)
    monkeypatch.setattr(doctor, "emulator_version", lambda _emulator: (11, 1, 2))
    monkeypatch.setattr(doctor, "plugin_path", lambda api: tmp_path / f"mktme-api{api}.so")
    return replace


def test_plugin_that_qemu_takes(emulator: Callable[[str], None]) -> None:
    emulator('test "$5" = -plugin && echo "mktme: socket=PATH is missing" >&2; exit 1')
    assert doctor._plugin() == "mktme-api7.so is accepted"
    assert doctor._qemu11() == "QEMU 11.1.2, mktme-api7.so is accepted"


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo starting >&2; echo 'plugin: API too old' >&2; exit 1", "api7.so: plugin: API too"),
        ("exit 0", "api7.so: no answer"),
        ("exec /nonexistent/qemu", "nonexistent"),
    ],
)
@pytest.mark.parametrize("check", [doctor._plugin, doctor._qemu11])
def test_plugin_that_qemu_does_not_take(
    emulator: Callable[[str], None], script: str, found: str, check: Callable[[], str]
) -> None:
    emulator(script)
    with pytest.raises(EnvironmentUnfitError, match=found) as caught:
        check()
    assert caught.value.hint == "make setup"


def test_qemu_that_hangs(emulator: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE_TIMEOUT_S", 0.05)
    emulator("exec cat /dev/zero >/dev/null")
    with pytest.raises(EnvironmentUnfitError, match="timed out"):
        doctor._plugin()


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo '{}'", "does not run"),
        ("echo no JSON", "does not run"),
        ("exit 1", "does not run"),
        ("""echo '{"features": ["tpm-1.2"], "version": "0.5"}'""", "too old"),
        (None, "does not run"),
    ],
)
def test_swtpm_that_will_not_do(
    script: str | None, found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if script is not None:
        (tmp_path / "swtpm_setup").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "swtpm_setup").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentUnfitError, match=found) as caught:
        doctor._vtpm()
    assert caught.value.hint == "make setup"


def test_missing_qemu11_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    unfit = EnvironmentUnfitError("there is no QEMU 11", hint="make qemu11")
    monkeypatch.setattr(doctor, "emulator_path", raising(unfit))
    assert doctor._qemu11() == "not installed: make qemu11"


@pytest.mark.usefixtures("write_tracking")
def test_write_tracking_of_this_machine() -> None:
    assert "write tracking" in doctor._userfaultfd()
    assert "finds written pages" in doctor._pagemap_scan()


def test_no_permission_for_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    unfit = WriteTrackingError("no permission", hint="sudo setfacl")
    monkeypatch.setattr(doctor, "open_write_tracking", raising(unfit))
    (finding,) = (one for one in examine_only("_userfaultfd", monkeypatch) if not one.fit)
    assert finding == Finding("userfaultfd", False, "no permission", "sudo setfacl")


@pytest.mark.usefixtures("fault_handling")
def test_fault_handling_of_this_machine() -> None:
    assert doctor._inline() == "userfaultfd stops system calls, too"


def test_userfaultfd_for_user_mode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for `shadow`: it is the inline data path that this machine cannot have."""
    unfit = FaultServiceError("no permission", hint="sudo setfacl")
    monkeypatch.setattr(doctor, "require_fault_handling", raising(unfit))
    (finding,) = (one for one in examine_only("_inline", monkeypatch) if not one.fit)
    assert finding == Finding("inline data path", False, "no permission", "sudo setfacl")


def examine_only(check: str, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    for other in CHECKS:
        if other != check:
            monkeypatch.setattr(doctor, other, lambda: "")
    return examine()


def test_image_that_is_not_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    unfit = ImageError("vmlinuz is not what linux-image holds", hint="remove it")
    monkeypatch.setattr(images, "ensure", lambda _name: IMAGE)
    monkeypatch.setattr(images, "verify", raising(unfit))
    (finding,) = (one for one in examine_only("_image", monkeypatch) if not one.fit)
    assert finding == Finding("guest image", False, str(unfit), "remove it")
    monkeypatch.setattr(images, "verify", lambda image: image.manifest)
    assert doctor._image() == "tiny: linux-image-amd64 6.1, as Debian ships it"


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_memory_bytes", lambda: 3 << 30)
    assert doctor._memory() == "3072 MiB available"
    monkeypatch.setattr(doctor, "available_memory_bytes", lambda: (3 << 30) - 1)
    with pytest.raises(EnvironmentUnfitError, match="3071 MiB available") as caught:
        doctor._memory()
    assert "--memory" in str(caught.value.hint)


def test_little_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MiB free in" in doctor._disk()
    monkeypatch.setattr(doctor, "DISK_NEEDED_BYTES", 1 << 60)
    with pytest.raises(EnvironmentUnfitError, match="does not fit"):
        doctor._disk()


def test_missing_openssl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentUnfitError, match="not installed"):
        doctor._openssl()
    (tmp_path / "openssl").write_text("#!/bin/sh\n")
    (tmp_path / "openssl").chmod(0o755)
    assert doctor._openssl() == str(tmp_path / "openssl")


def test_report_is_a_document() -> None:
    findings = (Finding("disk", False, "full", "df"), Finding("memory", True, "plenty"))
    report = DoctorReport("mktme.doctor", 1, findings)
    data = msgspec.json.encode(report)
    assert msgspec.json.decode(data, type=DoctorReport) == report
    assert msgspec.json.decode(data)["findings"][0] == {
        "name": "disk",
        "fit": False,
        "found": "full",
        "remedy": "df",
    }
