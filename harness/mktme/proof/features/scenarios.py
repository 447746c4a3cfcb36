# SPDX-License-Identifier: GPL-2.0-or-later
"""The guests of the feature table, and which rows are checked in which of them.

A guest takes half a minute to boot, so each has all the devices that go together.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.proof.features import devices, life
from mktme.proof.features.subject import Check, Subject
from mktme.proof.guest_tools import equip
from mktme.vm.config import VmConfig, region_bytes
from mktme.vm.hardware import Firmware, Hardware, Machine
from mktme.vm.images import guest_image
from mktme.vm.platform import Platform
from mktme.vm.reaper import process_dir

MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the feature table.

    Attributes:
        name: what it is about, as users say it.
        check: what is done.
        nightly: whether `make test` leaves it to `make nightly`.
        ends: whether the guest is gone after it.
    """

    name: str
    check: Check
    nightly: bool = False
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Scenario:
    """A guest, and its rows in the order in which they are checked.

    Attributes:
        name: of the scenario; short.
        guest: a recipe's name.
        summary: the guest in a few words.
        memory_bytes: its RAM.
        vcpus: its vCPUs.
        machine: its chipset.
        firmware: what boots it.
        devices: libvirt's XML of devices; ``{directory}`` is the subject's directory.
        arguments: QEMU's options for further devices, likewise.
        rows: what is checked.
    """

    name: str
    guest: str
    summary: str
    memory_bytes: int
    vcpus: int
    rows: tuple[Row, ...]
    machine: Machine = Machine.Q35
    firmware: Firmware = Firmware.BIOS
    devices: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()

    def config(self, datapath: DataPath, directory: Path) -> VmConfig:
        """The guest's configuration on a data path."""
        track = Track.STORES_AND_PAGES if datapath is DataPath.SHADOW else None
        hardware = Hardware(
            self.machine,
            self.firmware,
            tuple(one.format(directory=directory) for one in self.devices),
            tuple(one.format(directory=directory) for one in self.arguments),
        )
        return VmConfig(
            guest_image(self.guest),
            memory_bytes=self.memory_bytes,
            vcpus=self.vcpus,
            datapath=datapath,
            track=track,
            hardware=hardware,
        )

    @contextlib.contextmanager
    def booted(self, datapath: DataPath) -> Iterator[Subject]:
        """The guest, up, on a platform of its own.

        Raises:
            MktmeError: it did not come up.
        """
        with contextlib.ExitStack() as stack:
            # In there it goes with the process, however that ends.
            temporary = tempfile.TemporaryDirectory(prefix="features-", dir=process_dir())
            directory = Path(stack.enter_context(temporary))
            _prepare(directory)
            config = self.config(datapath, directory)
            platform = stack.enter_context(Platform(region_bytes(self.memory_bytes)))
            vm = stack.enter_context(platform.launch(config, self.name, boot=False))
            vm.domain.boot(config.boot_deadline_s)
            equip(vm)
            yield Subject(platform, vm, directory)


def _prepare(directory: Path) -> None:
    """What devices lead to on the host."""
    for name in ("blk", "scsi"):
        with devices.disk_path(directory, name).open("wb") as file:
            file.truncate(devices.DISK_BYTES)
    (directory / "shared").mkdir()


def _blk(driver: str) -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw' {driver}/>"
        "<source file='{directory}/blk.img'/><target dev='vdc' bus='virtio'/>"
        "<serial>mktme-blk</serial></disk>"
    )


_SCSI: Final = (
    "<controller type='scsi' index='0' model='virtio-scsi'/>",
    "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
    "<source file='{directory}/scsi.img'/><target dev='sda' bus='scsi'/>"
    "<serial>mktme-scsi</serial></disk>",
)
_RNG: Final = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"
_HVC: Final = (
    "<console type='unix'><source mode='bind' path='{directory}/hvc'/>"
    "<target type='virtio' port='1'/></console>"
)
_SHARED: Final = (
    "<filesystem type='mount' accessmode='mapped'><source dir='{directory}/shared'/>"
    "<target dir='mktme'/></filesystem>"
)
# QEMU plugs nothing into the root bus. Devices take ports in this order, and some are left.
_PORTS: Final = tuple(
    f"<controller type='pci' index='{index}' model='pcie-root-port'/>" for index in range(1, 14)
)
_CRYPTO: Final = "<crypto model='virtio' type='qemu'><backend model='builtin' queues='1'/></crypto>"
_IGB: Final = (
    "-netdev",
    "user,id=mktme-igb,net=10.0.77.0/24",
    "-device",
    "pcie-root-port,id=mktme-igb-port,chassis=77,addr=0x11",
    "-device",
    "igb,bus=mktme-igb-port,netdev=mktme-igb,mac=52:54:00:77:77:77",
)
_EDU: Final = ("-device", "edu,dma_mask=0xffffffffffffffff,addr=0x10")

_GUEST_ROWS: Final = (
    Row("boots, systemd running", life.boots),
    Row("login over ssh", life.ssh),
    Row("login on the serial console", life.console),
    Row("workload", life.workload),
)
_PROOFS: Final = Row("DRAM is its RAM, encrypted", life.proofs)
_UNMODIFIED: Final = Row("packages unmodified after all this", life.unmodified)
_SHUTDOWN: Final = Row("shutdown by the power button", life.shutdown, ends=True)

SCENARIOS: Final = (
    Scenario(
        "devices",
        "debian-12",
        "Debian 12, q35, SeaBIOS, 2 vCPUs",
        768 * MIB,
        2,
        (
            *_GUEST_ROWS,
            Row("virtio-blk, packed rings", devices.packed_rings),
            Row("virtio-blk, a queue for each vCPU", devices.multiqueue),
            Row("virtio-scsi", devices.virtio_scsi),
            Row("virtio-net", devices.virtio_net),
            Row("virtio-net, a queue for each vCPU", devices.network_multiqueue),
            Row("virtio-rng", devices.virtio_rng),
            Row("virtio-console", devices.virtio_console),
            Row("9p shared directory", devices.shared_directory),
            Row("virtio-balloon: inflate, deflate", devices.balloon),
            Row("virtio-balloon: free page reporting", devices.free_page_reporting),
            Row("O_DIRECT in the guest, fio verify", devices.direct_io),
            Row("SR-IOV: igb virtual functions", devices.sr_iov),
            Row("virtio-crypto, kernel AES-CBC", devices.virtio_crypto),
            Row("edu: DMA from user space", devices.edu),
            _PROOFS,
            Row("pause and resume", life.pause),
            # After it no power button works, on plain QEMU as well, until the guest boots again.
            Row("suspend to RAM (S3) and wake", life.standby, nightly=True),
            # These take a minute or two each.
            Row("kexec", life.kexec, nightly=True),
            Row("reboot", life.reboot, nightly=True),
            _UNMODIFIED,
            _SHUTDOWN,
        ),
        devices=(_blk("queues='2' packed='on'"), *_SCSI, _RNG, _HVC, _SHARED, _CRYPTO, *_PORTS),
        arguments=(*_IGB, *_EDU),
    ),
    Scenario(
        "iommu",
        "debian-13",
        "Debian 13, q35, UEFI, Intel IOMMU, 1 vCPU",
        1024 * MIB,
        1,
        (
            *_GUEST_ROWS,
            Row("virtio under the IOMMU (iommu_platform)", devices.iommu_platform),
            _PROOFS,
            Row("reset", life.reset, nightly=True),
            _UNMODIFIED,
            _SHUTDOWN,
        ),
        firmware=Firmware.UEFI,
        devices=("<iommu model='intel'/>", _blk("iommu='on'")),
    ),
    Scenario(
        "pc",
        "debian-12",
        "Debian 12, pc, SeaBIOS, 4 vCPUs, 384 MiB",
        384 * MIB,
        4,
        (
            *_GUEST_ROWS,
            Row("virtio-blk", devices.virtio_blk),
            _PROOFS,
            Row("hard stop", life.hard_stop, ends=True),
        ),
        machine=Machine.PC,
        devices=(_blk(""),),
    ),
)
