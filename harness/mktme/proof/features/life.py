# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's life: what it boots, how it is reached, and what becomes of it."""

from __future__ import annotations

from typing import Final

from mktme.proof.confidentiality import Canary, plant_canary, search_dram
from mktme.proof.features.subject import (
    BOOT_AGAIN_TIMEOUT_S,
    COMMAND_TIMEOUT_S,
    FeatureError,
    Subject,
    require,
    until,
)
from mktme.proof.guest_files import changed_files
from mktme.proof.transparency import compare_memory, run_workload
from mktme.vm.console import VmError
from mktme.vm.disk_images import DiskImage, verify_disk
from mktme.vm.ssh import LoginKey, Ssh

_SHUTDOWN_TIMEOUT_S: Final = 120.0
_FORGET_TIMEOUT_S: Final = 10.0


def boots(subject: Subject) -> str:
    """Its own kernel, from its own disk, by the firmware asked for."""
    uefi = subject.run("test -d /sys/firmware/efi && echo uefi || echo bios").strip()
    require(uefi == subject.vm.config.hardware.firmware.value, f"it booted by {uefi}")
    state = subject.run("systemctl is-system-running --wait || true", BOOT_AGAIN_TIMEOUT_S).strip()
    failed = subject.run("systemctl --failed --no-legend --plain | cut -d' ' -f1").split()
    require(state == "running", f"systemd is {state}: {', '.join(failed)} failed")
    kernel = subject.run("uname -r").strip()
    vcpus = subject.run("nproc").strip()
    require(vcpus == str(subject.vm.config.vcpus), f"it has {vcpus} vCPUs")
    return f"Linux {kernel}, systemd running"


def unmodified(subject: Subject) -> str:
    """Every file of its packages is as in the package; a changed one is found (the control).

    So it was before: the image is, byte for byte, what was compared with the packages when it was
    built, and the guest has written to its own layer alone.
    """
    image = subject.vm.config.image
    if isinstance(image, DiskImage):
        verify_disk(image)
    count, changed = changed_files(subject.vm)
    require(not changed, f"{len(changed)} files differ, {', '.join(changed[:3])}")
    victim = "/usr/share/base-files/motd"
    subject.run(f"cp -a {victim} /run/kept; echo >>{victim}")
    found = changed_files(subject.vm, [victim])[1]
    subject.run(f"cp -a /run/kept {victim}; rm /run/kept")
    require(found == [victim], f"a changed file was not noticed: {found}")
    return f"{count:,} files of its packages; a changed one noticed"


def ssh(subject: Subject) -> str:
    """Its key is the one that its console showed; another one is refused (the control)."""
    domain = subject.vm.domain
    access = domain.access
    try:
        Ssh(access, LoginKey().key, 5.0).close()
    except VmError:
        pass
    else:
        raise FeatureError("a host key that is not the guest's was taken")
    return "by its own key, host key pinned from the console; another refused"


def console(subject: Subject) -> str:
    """A root shell on the serial console."""
    access = subject.vm.domain.access
    terminal = subject.vm.domain.console
    terminal.log_in(access.user, access.password, COMMAND_TIMEOUT_S)
    said = terminal.run("id -u", COMMAND_TIMEOUT_S).output.strip()
    terminal.send("exit")
    require(said == "0", f"the console says {said}")
    return "root shell on ttyS0"


def workload(subject: Subject) -> str:
    """Its workload gives the sums that any machine gives."""
    sums = run_workload(subject.vm.domain.shell)
    return f"{len(sums)} checksums as known beforehand"


def proofs(subject: Subject) -> str:
    """Held, DRAM decrypts to the guest's RAM, and has its canary nowhere."""
    canary = Canary.random()
    plant_canary(subject.vm, canary)
    with subject.vm.held() as engine:
        found = compare_memory(subject.vm, engine)
        require(found.passed, f"{found.lines_mismatched:,} lines differ")
        search = search_dram(subject.vm, canary, subject.platform.dram_path)
    require(search.passed, f"{search.dram_hits} blocks of the canary are in DRAM")
    return f"0 of {found.lines_compared:,} lines differ, canary not in DRAM"


def pause(subject: Subject) -> str:
    """Stopped and resumed by libvirt: the guest is where it was."""
    before = subject.boot_id()
    with subject.vm.domain.paused():
        require(subject.vm.domain.is_paused, "libvirt does not have it as paused")
    require(subject.boot_id() == before, "it booted meanwhile")
    return "paused and resumed, same boot"


def standby(subject: Subject) -> str:
    """ACPI S3: memory keeps what it held, and the guest wakes to it."""
    before = subject.boot_id()
    subject.run("head -c 8M /dev/urandom >/run/kept; sha256sum /run/kept >/run/kept.sum")
    subject.vm.domain.standby(_SHUTDOWN_TIMEOUT_S)
    require(subject.boot_id() == before, "it booted meanwhile")
    subject.run("sha256sum -c /run/kept.sum; rm /run/kept*")
    return "suspended to RAM and woken, its data as before"


def reboot(subject: Subject) -> str:
    """By itself."""
    return _another_boot(subject, "reboot")


def reset(subject: Subject) -> str:
    """By the button."""
    return _another_boot(subject, "reset")


def kexec(subject: Subject) -> str:
    """Its kernel starts another one, without firmware."""
    return _another_boot(subject, "kexec")


def _another_boot(subject: Subject, how: str) -> str:
    domain = subject.vm.domain
    before = subject.boot_id()
    match how:
        case "reboot":
            domain.reboot(BOOT_AGAIN_TIMEOUT_S)
        case "reset":
            domain.reset(BOOT_AGAIN_TIMEOUT_S)
        case _:
            subject.run("kexec -l /vmlinuz --initrd=/initrd.img --reuse-cmdline")
            domain.reboot(BOOT_AGAIN_TIMEOUT_S, "kexec")
    require(subject.boot_id() != before, "it did not boot again")
    with subject.vm.held() as engine:
        found = compare_memory(subject.vm, engine)
    require(found.passed, f"{found.lines_mismatched:,} lines differ after it")
    return "up again, another boot; DRAM is its RAM"


def shutdown(subject: Subject) -> str:
    """By the power button: systemd stops all, and QEMU ends."""
    subject.vm.domain.power_off(_SHUTDOWN_TIMEOUT_S)
    _require_ended(subject)
    return "by the power button"


def hard_stop(subject: Subject) -> str:
    """At once, whatever it is doing."""
    subject.vm.domain.destroy()
    _require_ended(subject)
    return "QEMU ended at once"


def _require_ended(subject: Subject) -> None:
    # libvirt forgets a domain a moment after its QEMU has ended.
    ended = until(lambda: not subject.vm.domain.is_active, _FORGET_TIMEOUT_S)
    require(ended, "QEMU is still there")
