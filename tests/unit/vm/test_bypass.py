# SPDX-License-Identifier: GPL-2.0-or-later
"""What would bypass a data path is refused, and what comes next to it is not."""

from __future__ import annotations

import uuid
import xml.etree.ElementTree as ET
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest

from mktme.vm.bypass import BypassError, refuse_bypasses
from mktme.vm.domain_xml import DomainSpec, domain_xml
from mktme.vm.host import UsageError
from mktme.vm.images import GuestImage, Manifest, Package

MEMFD = "<source type='memfd'/><access mode='shared'/>"
BOTH = [False, True]


def domain(
    *commandline: str, devices: str = "", backing: str = MEMFD, cells: tuple[str, ...] = ()
) -> str:
    """A domain with the parts that matter here."""
    cpu = f"<cpu><numa>{''.join(cells)}</numa></cpu>" if cells else ""
    arguments = "".join(f"<qemu:arg value={quoteattr(text)}/>" for text in commandline)
    return (
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
        f"<memoryBacking>{backing}</memoryBacking>{cpu}<devices>{devices}</devices>"
        f"<qemu:commandline>{arguments}</qemu:commandline></domain>"
    )


def refusal(xml: str, *, inline: bool) -> BypassError:
    with pytest.raises(BypassError) as caught:
        refuse_bypasses(xml, inline=inline)
    return caught.value


@pytest.mark.parametrize("inline", BOTH)
def test_our_own_domains_are_allowed(inline: bool) -> None:
    package = Package("linux-image-amd64", "6.1", "0" * 64, "./boot/vmlinuz", "0" * 64)
    manifest = Manifest("tiny", "debian bookworm", "quiet", package, ())
    spec = DomainSpec(
        name="one",
        uuid=uuid.uuid4(),
        image=GuestImage("tiny", Path("/vmlinuz"), Path("/initrd"), "quiet", manifest),
        memory_bytes=512 << 20,
        vcpus=1,
        console_socket=Path("/console"),
        emulator=Path("/usr/bin/qemu-system-x86_64"),
        plugin="/plugin.so,socket=/vfio,,vhost-user/link.sock",
    )
    refuse_bypasses(domain_xml(spec), inline=inline)
    refuse_bypasses(ET.fromstring(domain_xml(spec)), inline=inline)


@pytest.mark.parametrize("inline", BOTH)
def test_the_smallest_domain_of_these_tests_is_allowed(inline: bool) -> None:
    refuse_bypasses(domain(), inline=inline)


def test_a_refusal_is_a_usage_error_that_says_what_why_and_what_instead() -> None:
    error = refusal(domain(devices="<disk><driver cache='none'/></disk>"), inline=True)
    assert isinstance(error, UsageError)
    assert str(error) == (
        "<disk> with cache='none': the host transfers data to and from pinned guest pages"
    )
    assert error.hint == "leave out cache= and io=, or use cache='writeback' and io='threads'"


@pytest.mark.parametrize("inline", BOTH)
@pytest.mark.parametrize(
    ("backing", "cells", "says"),
    [
        ("", (), "<source type='memfd'/>"),
        ("<access mode='shared'/>", (), "<source type='memfd'/>"),
        ("<source type='anonymous'/><access mode='shared'/>", (), "<source type='memfd'/>"),
        ("<source type='file'/><access mode='shared'/>", (), "<source type='memfd'/>"),
        ("<source type='memfd'/>", (), "<access mode='shared'/>"),
        ("<source type='memfd'/><access mode='private'/>", (), "<access mode='shared'/>"),
        (MEMFD, ("<cell/>", "<cell memAccess='private'/>"), "<access mode='shared'/>"),
        ("<source type='memfd'/>", ("<cell memAccess='shared'/>", "<cell/>"), "<access"),
    ],
)
def test_memory_that_the_plugin_does_not_find(
    backing: str, cells: tuple[str, ...], says: str, inline: bool
) -> None:
    error = refusal(domain(backing=backing, cells=cells), inline=inline)
    assert says in str(error)
    assert error.hint is not None
    assert MEMFD in error.hint


@pytest.mark.parametrize("inline", BOTH)
@pytest.mark.parametrize(
    ("backing", "cells"),
    [
        (MEMFD, ("<cell/>", "<cell memAccess='shared'/>")),
        ("<source type='memfd'/>", ("<cell memAccess='shared'/>",)),
        (MEMFD + "<nosharepages/><discard/><allocation mode='ondemand' threads='2'/>", ()),
    ],
)
def test_memory_that_the_plugin_finds(backing: str, cells: tuple[str, ...], inline: bool) -> None:
    refuse_bypasses(domain(backing=backing, cells=cells), inline=inline)


def test_a_domain_that_says_nothing_of_its_memory_is_refused() -> None:
    assert "memfd" in str(refusal("<domain/>", inline=False))


@pytest.mark.parametrize(
    ("backing", "commandline", "why"),
    [
        ("<hugepages/>", (), "pages of 4 KiB"),
        ("<locked/>", (), "all of guest RAM"),
        ("<allocation mode='immediate'/>", (), "all of guest RAM"),
        ("", ("-mem-prealloc",), "all of guest RAM"),
        ("", ("-overcommit", "mem-lock=on"), "all of guest RAM"),
        ("", ("-overcommit", "cpu-pm=on,mem-lock"), "all of guest RAM"),
        ("", ("-object", "memory-backend-memfd,id=a,size=1G,prealloc=on"), "all of guest RAM"),
        ("", ("-object", "memory-backend-memfd,id=a,size=1G,hugetlb=on"), "pages of 4 KiB"),
        (
            "",
            ("-object", '{"qom-type": "memory-backend-memfd", "id": "a", "hugetlb": true}'),
            "pages of 4 KiB",
        ),
    ],
)
def test_an_empty_window_of_small_pages_is_for_inline_alone(
    backing: str, commandline: tuple[str, ...], why: str
) -> None:
    xml = domain(*commandline, backing=MEMFD + backing)
    error = refusal(xml, inline=True)
    assert why in str(error)
    assert error.hint == "leave it out, or use the shadow data path"
    refuse_bypasses(xml, inline=False)


@pytest.mark.parametrize(
    "commandline",
    [
        ("-overcommit", "cpu-pm=on,mem-lock=off"),
        ("-object", "memory-backend-memfd,id=a,size=1G,share=on,prealloc=off,hugetlb=off"),
        ("-object", '{"qom-type":"memory-backend-memfd","id":"a","prealloc":false}'),
        ("-m", "512M"),
    ],
)
def test_a_window_that_starts_empty_is_allowed(commandline: tuple[str, ...]) -> None:
    refuse_bypasses(domain(*commandline), inline=True)


BYPASSING_DEVICES = [
    (
        "<filesystem type='mount'><driver type='virtiofs'/></filesystem>",
        "<filesystem type='mount'><driver type='path'/></filesystem>",
        "9p",
    ),
    (
        "<filesystem type='mount'><driver type='virtiofs' queue='1024'/></filesystem>",
        "<filesystem type='mount'/>",
        "9p",
    ),
    ("<interface type='vhostuser'/>", "<interface type='user'/>", "<interface type='user'>"),
    ("<interface type='hostdev'/>", "<interface type='network'/>", "igb"),
    ("<interface type='vdpa'/>", "<interface type='bridge'/>", "igb"),
    ("<hostdev mode='subsystem' type='pci'/>", "<hostdev type='usb'/>", "igb"),
    ("<hostdev mode='subsystem' type='mdev'/>", "<hostdev type='scsi'/>", "igb"),
    ("<hostdev mode='subsystem' type='scsi_host'/>", "<controller type='scsi'/>", "igb"),
    ("<disk type='vhostuser'/>", "<disk type='file'/>", "<disk type='file'>"),
    ("<disk type='vhostvdpa'/>", "<disk type='network'/>", "<disk type='file'>"),
    ("<disk type='nvme'/>", "<disk type='block' device='disk'/>", "<disk type='file'>"),
    ("<disk type='block' device='lun'/>", "<disk type='file' device='cdrom'/>", "device='disk'"),
    ("<disk><driver cache='none'/></disk>", "<disk><driver cache='writeback'/></disk>", "cache"),
    (
        "<disk><driver cache='directsync'/></disk>",
        "<disk><driver cache='writethrough' iothread='1'/></disk>",
        "cache='writeback'",
    ),
    (
        "<disk><driver io='native'/></disk>",
        "<disk><driver io='threads' cache='unsafe'/></disk>",
        "io='threads'",
    ),
    (
        "<video><driver name='vhostuser'/></video>",
        "<video><driver name='qemu'/></video>",
        "emulates",
    ),
    (
        "<video><model type='virtio' blob='on'/></video>",
        "<video><model type='virtio' blob='off'/></video>",
        "leave blob out",
    ),
    ("<input type='vhostuser'/>", "<input type='passthrough'/>", "emulates"),
    ("<crypto model='virtio' type='vhostuser'/>", "<crypto model='virtio'/>", "emulates"),
    ("<memory model='nvdimm'/>", "<memballoon model='virtio'/>", "--nvdimm"),
    ("<memory model='virtio-mem'/>", "<memballoon model='virtio'/>", "<memory>"),
    ("<memory model='dimm'/>", "<vsock model='virtio'/>", "<memory>"),
]


@pytest.mark.parametrize("inline", BOTH)
@pytest.mark.parametrize(("refused", "allowed", "instead"), BYPASSING_DEVICES)
def test_devices_past_both_data_paths(
    refused: str, allowed: str, instead: str, inline: bool
) -> None:
    # Among others, and not the first.
    error = refusal(domain(devices=allowed + refused), inline=inline)
    assert error.hint is not None
    assert instead in error.hint
    refuse_bypasses(domain(devices=allowed), inline=inline)


def test_io_uring_of_a_disk_is_for_shadow_alone() -> None:
    """Its buffered transfers copy; the buffers that it may register with the kernel are pinned."""
    xml = domain(devices="<disk><driver io='io_uring'/></disk>")
    error = refusal(xml, inline=True)
    assert "io='io_uring'" in str(error)
    refuse_bypasses(xml, inline=False)
    xml = domain("-drive", "file=/a,aio=io_uring")
    assert "aio=io_uring" in str(refusal(xml, inline=True))
    refuse_bypasses(xml, inline=False)


BYPASSING_OPTIONS = [
    (("-device", "vhost-user-fs-pci,chardev=a,tag=b"), ("-device", "virtio-9p-pci,fsdev=a"), "9p"),
    (("-device", "vhost-user-blk-pci,chardev=a"), ("-device", "virtio-blk-pci,drive=a"), "emul"),
    (("-device", "driver=vhost-user-gpu,id=a"), ("-device", "driver=virtio-gpu,id=a"), "emul"),
    (("-device", '{"driver":"vhost-user-input"}'), ("-device", '{"driver":"edu"}'), "emul"),
    (("-netdev", "vhost-user,id=a,chardev=b"), ("-netdev", "user,id=vhost-user"), "emul"),
    (
        ("-netdev", "type=vhost-user,id=a,chardev=b"),
        ("-chardev", "socket,id=b,path=/run/vhost-user"),
        "emul",
    ),
    (("-netdev", "vhost-vdpa,id=a"), ("-netdev", "tap,id=a,vhost=on"), "igb"),
    (
        ("-object", "cryptodev-vhost-user,id=a,chardev=b"),
        ("-object", "cryptodev-backend-builtin,id=a"),
        "emul",
    ),
    (("-device", "vfio-pci,host=01:00.0"), ("-device", "igb,id=vfio-pci"), "igb"),
    (("--device", "vfio-user-pci,socket=/a"), ("--device", "intel-iommu"), "igb"),
    (("-device", "vhost-scsi-pci,wwpn=a"), ("-device", "virtio-scsi-pci"), "igb"),
    (("-device", "x-pci-proxy-dev,id=a,fd=1"), ("-device", "pci-testdev"), "emul"),
    (("-blockdev", "driver=nvme,device=a"), ("-device", "nvme,drive=a,serial=b"), "file"),
    (("-drive", "file.driver=nvme,if=none"), ("-drive", "driver=file,filename=nvme"), "file"),
    (("-drive", "file=nvme://0000:01:00.0/1"), ("-drive", "file=/nvme://a"), "file"),
    (
        ("-blockdev", "virtio-blk-vhost-user,node-name=a"),
        ("-blockdev", "file,node-name=a,filename=/virtio-blk-vhost-user"),
        "emul",
    ),
    (("-blockdev", "io_uring,filename=/a"), ("-blockdev", "file,filename=io_uring"), "file"),
    (("-device", "scsi-block,drive=a"), ("-device", "scsi-hd,drive=a"), "file"),
    (("-drive", "file=/a,cache=none"), ("-drive", "file=/a,cache=writeback"), "cache="),
    (("-drive", "file=/a,cache=directsync"), ("-drive", "file=/a,,cache=directsync"), "cache="),
    (
        ("-blockdev", "file,filename=/a,cache.direct=on"),
        ("-blockdev", "file,filename=/a,cache.direct=off,cache.no-flush=on"),
        "cache=",
    ),
    (
        ("-blockdev", '{"driver":"qcow2","file":{"driver":"file","cache":{"direct":true}}}'),
        ("-blockdev", '{"driver":"qcow2","file":{"driver":"file","cache":{"direct":false}}}'),
        "cache=",
    ),
    (
        ("-drive", 'file=json:{"driver":"file",,"aio":"native"}'),
        ("-drive", 'file=json:{"driver":"file",,"aio":"threads"}'),
        "io='threads'",
    ),
    (("-drive", "file=/a,aio=native"), ("-drive", "file=/a,aio=threads"), "io='threads'"),
    (("-set", "drive.a.aio=native"), ("-set", "drive.a.aio=threads"), "io='threads'"),
    (("-device", "virtio-gpu,blob=on"), ("-device", "virtio-gpu,blob=off"), "blob"),
    (("-global", "virtio-gpu-pci.blob=on"), ("-global", "virtio-gpu-pci.xres=640"), "blob"),
    (("-incoming", "rdma:host:4444"), ("-incoming", "tcp:rdma:4444"), "tcp:"),
    (
        ("-incoming", '{"channel-type":"main","addr":{"transport":"rdma","host":"a"}}'),
        ("-incoming", '{"channel-type":"main","addr":{"transport":"socket","host":"rdma"}}'),
        "tcp:",
    ),
    (
        ("-object", "memory-backend-file,id=a,mem-path=/a,size=1G,share=on"),
        ("-object", "memory-backend-memfd,id=memory-backend-file,size=1G"),
        "memfd",
    ),
    (("-object", "memory-backend-ram,id=a,size=1G"), ("-object", "iothread,id=a"), "memfd"),
    (("-object", '{"qom-type":"memory-backend-epc"}'), ("-object", "rng-builtin,id=a"), "memfd"),
    (("-object", "memory-backend-shm,id=a,size=1G"), ("-object", "secret,id=a,data=b"), "memfd"),
    (
        ("-object", "memory-backend-memfd,id=a,size=1G,share=off"),
        ("-object", "memory-backend-memfd,id=a,size=1G,share=on"),
        "memfd",
    ),
    (("-mem-path", "/dev/hugepages"), ("-name", "mem-path"), "memfd"),
    (("-device", "nvdimm,memdev=a"), ("-machine", "q35,nvdimm=on"), "--nvdimm"),
    (("-device", "pc-dimm,memdev=a"), ("-m", "slots=1,maxmem=1G"), "<memory>"),
    (("-device", "virtio-mem-pci,memdev=a"), ("-device", "virtio-balloon-pci"), "<memory>"),
    (("-readconfig", "/a"), ("-nodefaults",), "options themselves"),
]


@pytest.mark.parametrize("inline", BOTH)
@pytest.mark.parametrize(("refused", "allowed", "instead"), BYPASSING_OPTIONS)
def test_qemu_options_past_both_data_paths(
    refused: tuple[str, ...], allowed: tuple[str, ...], instead: str, inline: bool
) -> None:
    error = refusal(domain(*allowed, *refused), inline=inline)
    assert refused[0].removeprefix("-") in str(error)
    assert error.hint is not None
    assert instead in error.hint
    refuse_bypasses(domain(*allowed), inline=inline)


@pytest.mark.parametrize("inline", BOTH)
def test_an_nvdimm_that_the_engine_knows_is_allowed(inline: bool) -> None:
    device = ("-device", '{"driver":"nvdimm","memdev":"a"}')
    backend = ("-object", '{"qom-type":"memory-backend-memfd","id":"a","share":true,"size":4096}')
    refuse_bypasses(domain(*backend, *device), inline=inline, nvdimm=True)
    with pytest.raises(BypassError, match="driver=nvdimm"):
        refuse_bypasses(domain(*backend, *device), inline=inline)
    for others in (
        ("-object", "memory-backend-file,id=a,mem-path=/a,size=1G,share=on"),
        ("-object", "memory-backend-memfd,id=a,size=1G,share=off"),
        ("-device", "pc-dimm,memdev=a"),
        ("-device", "virtio-pmem-pci,memdev=a"),
    ):
        with pytest.raises(BypassError):
            refuse_bypasses(domain(*others, *device), inline=inline, nvdimm=True)


def test_json_that_is_none_is_refused() -> None:
    error = refusal(domain("-device", '{"driver":"edu"'), inline=False)
    assert "delimiter" in str(error)
    assert error.hint == "QEMU takes well-formed JSON only"
