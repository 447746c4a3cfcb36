# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices that data go through: each is given data that the host knows, and asked for them back."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import libvirt

from mktme.engine.xts import PAGE_BYTES
from mktme.proof.features import tap
from mktme.proof.features.programs import CRYPTO, ECHO, EDU
from mktme.proof.features.subject import (
    COMMAND_TIMEOUT_S,
    FeatureError,
    Subject,
    connect,
    echo_server,
    random_data,
    require,
    until,
)

DISK_BYTES: Final = 64 << 20
_DATA_MIB: Final = 8
_BALLOON_TIMEOUT_S: Final = 120.0
_NETWORK_MIB: Final = 2
_PLUG_TIMEOUT_S: Final = 60.0
_CARD: Final = "52:54:00:78:78:78"

# Virtio 1.2, 6: reserved feature bits.
_ACCESS_PLATFORM: Final = 33
_RING_PACKED: Final = 34


def disk_path(directory: Path, name: str) -> Path:
    """The image of a guest's data disk."""
    return directory / f"{name}.img"


def _round_trip(subject: Subject, name: str, device: str) -> str:
    """Write to a disk in the guest and read it again; the host's image has it, too."""
    data, expected = random_data(_DATA_MIB)
    subject.put("/run/data", data)
    subject.run(f"dd if=/run/data of={device} bs=1M conv=fsync; rm /run/data")
    read = subject.run(
        "echo 3 >/proc/sys/vm/drop_caches;"
        f" dd if={device} bs=1M count={_DATA_MIB} status=none | sha256sum"
    ).split()[0]
    require(read == expected, f"{device} reads other data than were written")
    with disk_path(subject.directory, name).open("rb") as file:
        stored = hashlib.sha256(file.read(len(data))).hexdigest()
    require(stored == expected, f"the image behind {device} has other data than were written")
    return f"{_DATA_MIB} MiB written, read back, and in the host's image"


def virtio_blk(subject: Subject) -> str:
    """A disk on virtio-blk."""
    return _round_trip(subject, "blk", "/dev/disk/by-id/virtio-mktme-blk")


def virtio_scsi(subject: Subject) -> str:
    """A disk on virtio-scsi."""
    device = subject.run("ls /dev/disk/by-id/scsi-*mktme-scsi | head -n 1").strip()
    return _round_trip(subject, "scsi", device)


def direct_io(subject: Subject) -> str:
    """O_DIRECT in the guest, blocks verified by fio; and a spoilt block is found (the control)."""
    device = "/dev/disk/by-id/virtio-mktme-blk"
    fio = (
        f"fio --name=mktme --filename={device} --direct=1 --ioengine=libaio --iodepth=8"
        " --rw=randwrite --bs=4k --size=16M --verify=crc32c --verify_fatal=1 --randseed=1"
        " --minimal --allow_mounted_write=1"
    )
    subject.run(f"{fio} --do_verify=1")
    spoil = f"dd if=/dev/urandom of={device} bs=4096 seek=100 count=1 oflag=direct conv=notrunc"
    subject.run(spoil)
    again = subject.vm.domain.shell.run(f"{fio} --verify_only", COMMAND_TIMEOUT_S, check=False)
    require(again.status != 0, "fio does not notice a block that was overwritten")
    return "fio: 4,096 blocks written and verified; a spoilt one noticed"


def virtio_net(subject: Subject) -> str:
    """The network that ssh goes through: data in and out again."""
    driver = subject.run(
        "basename $(readlink /sys/class/net/$(ip -o route get 10.0.2.2 |"
        " sed 's/.* dev //;s/ .*//')/device/driver)"
    ).strip()
    require(driver == "virtio_net", f"ssh goes through {driver}")
    data, expected = random_data(_DATA_MIB)
    subject.put("/run/data", data)
    there = subject.run("sha256sum </run/data").split()[0]
    back = subject.vm.domain.ssh.get("/run/data", COMMAND_TIMEOUT_S)
    subject.run("rm /run/data")
    require(there == expected and back == data, "the network changed data")
    return f"{_DATA_MIB} MiB in and out"


def virtio_rng(subject: Subject) -> str:
    """Random numbers from the host."""
    current = subject.run("cat /sys/class/misc/hw_random/rng_current").strip()
    require(current.startswith("virtio_rng"), f"the kernel's generator is {current}")
    kinds = subject.run("head -c 4096 /dev/hwrng | od -An -v -tu1 -w1 | sort -u | wc -l").strip()
    # Of 256 values, all but about 256 * exp(-16) turn up.
    require(int(kinds) > 250, f"4096 bytes from the host have {kinds} values")
    return f"4,096 bytes of {kinds} values"


def virtio_console(subject: Subject) -> str:
    """A line each way."""
    said, answer = "from the guest", "from the host"
    with connect(subject.directory / "hvc", COMMAND_TIMEOUT_S) as host:
        subject.run(f"stty -F /dev/hvc0 raw -echo; echo {said!r} >/dev/hvc0")
        received = b""
        while not received.endswith(b"\n"):
            more = host.recv(64)
            require(more, "the console ended")
            received += more
        host.sendall(f"{answer}\n".encode())
        line = subject.run("head -n 1 </dev/hvc0").strip()
    require(received.decode().strip() == said, f"the host got {received!r}")
    require(line == answer, f"the guest got {line!r}")
    return "a line each way"


def shared_directory(subject: Subject) -> str:
    """9p: a file of the host's read, and one written."""
    data, expected = random_data(_DATA_MIB)
    shared = subject.directory / "shared"
    (shared / "from-host").write_bytes(data)
    subject.run(
        "mkdir -p /run/9p; modprobe 9pnet_virtio; mount -t 9p -o trans=virtio mktme /run/9p"
    )
    read = subject.run(
        "sha256sum </run/9p/from-host; cp /run/9p/from-host /run/9p/from-guest; sync"
    )
    subject.run("umount /run/9p")
    require(read.split()[0] == expected, "the guest reads another file")
    require((shared / "from-guest").read_bytes() == data, "the host reads another file")
    return f"{_DATA_MIB} MiB read, and written"


def balloon(subject: Subject) -> str:
    """Inflate, and deflate: what the guest gave back is gone from DRAM, and it gets it again."""
    memory = subject.vm.config.memory_bytes
    before = _vanished(subject)
    subject.vm.domain.balloon(memory - (128 << 20), _BALLOON_TIMEOUT_S)
    given = _vanished(subject) - before
    subject.vm.domain.balloon(memory, _BALLOON_TIMEOUT_S)
    # Pages that the guest had not used since it booted are none that can leave.
    require(given * PAGE_BYTES >= 32 << 20, f"only {given} pages of 128 MiB left DRAM")
    return "128 MiB given back, their pages left DRAM, and taken again"


def free_page_reporting(subject: Subject) -> str:
    """The guest tells of pages that it does not use, and they leave DRAM."""
    subject.run("head -c 160M /dev/urandom >/dev/shm/free")
    before = _vanished(subject)
    subject.run("rm /dev/shm/free")
    # Linux reports blocks of 2 MiB, two seconds after they became free (mm/page_reporting.c).
    told = until(lambda: (_vanished(subject) - before) * PAGE_BYTES >= 24 << 20, 60.0)
    require(told, f"of 160 MiB only {_vanished(subject) - before} pages were reported")
    return "pages reported free left DRAM"


def _vanished(subject: Subject) -> int:
    if subject.vm.engine is None:
        return 0
    subject.vm.engine.flush(subject.vm.uuid)
    status = subject.vm.status()
    if status.paging is not None:
        return status.paging.pages_vanished
    return 0 if status.traffic is None else status.traffic.pages_vanished


def _features(subject: Subject, device: str) -> str:
    """A virtio device's negotiated features, a character a bit."""
    return subject.run(f"cat {device}/features").strip()


def _virtio_devices(subject: Subject, driver: str) -> list[str]:
    return subject.run(f"ls -d /sys/bus/virtio/drivers/{driver}/virtio*").split()


def packed_rings(subject: Subject) -> str:
    """The data disk's queues are packed virtqueues."""
    device = subject.run(
        "readlink -f /sys/block/$(basename $(readlink /dev/disk/by-id/virtio-mktme-blk))/device"
    ).strip()
    require(_features(subject, device)[_RING_PACKED] == "1", "the disk's rings are not packed")
    return "VIRTIO_F_RING_PACKED negotiated; " + _round_trip(
        subject, "blk", "/dev/disk/by-id/virtio-mktme-blk"
    )


def multiqueue(subject: Subject) -> str:
    """The data disk has a queue for each vCPU, and data went through all of them."""
    vcpus = subject.vm.config.vcpus
    block = subject.run("basename $(readlink /dev/disk/by-id/virtio-mktme-blk)").strip()
    queues = int(subject.run(f"ls /sys/block/{block}/mq | wc -l"))
    require(queues == vcpus, f"{queues} queues for {vcpus} vCPUs")
    for vcpu in range(vcpus):
        subject.run(f"taskset -c {vcpu} dd if=/dev/{block} of=/dev/null bs=1M count=4 iflag=direct")
    interrupts = subject.run(f"grep {_irq_name(subject, block)}-req /proc/interrupts")
    idle = [
        line for line in interrupts.splitlines() if not any(map(int, line.split()[1 : 1 + vcpus]))
    ]
    require(not idle, f"queues without an interrupt: {idle}")
    return f"{queues} queues, interrupts of each"


def network_multiqueue(subject: Subject) -> str:
    """A network card with a queue for each vCPU, plugged in: data through each of them and back."""
    with tap.multi_queue_tap() as device, _plugged_in(subject, device):
        return _through_each_queue(subject)


@contextlib.contextmanager
def _plugged_in(subject: Subject, device: str) -> Iterator[None]:
    """A virtio-net card on a tap device, with QEMU's own back end: vhost is another thing."""
    xml = (
        f"<interface type='ethernet'><mac address='{_CARD}'/><model type='virtio'/>"
        f"<target dev='{device}' managed='no'/>"
        f"<driver name='qemu' queues='{subject.vm.config.vcpus}'/></interface>"
    )
    domain = subject.vm.domain.handle
    try:
        domain.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        try:
            yield
        finally:
            domain.detachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as error:
        raise FeatureError(f"libvirt: {error}") from error


def _through_each_queue(subject: Subject) -> str:
    vcpus = subject.vm.config.vcpus
    find = f"grep -l {_CARD} /sys/class/net/*/address | cut -d/ -f5"
    require(until(lambda: bool(subject.run(find).strip()), _PLUG_TIMEOUT_S), "no card came")
    subject.run(
        f"udevadm settle; card=$({find}); ip netns add mq; ip link set $card netns mq name mq0;"
        f" ip -n mq addr add {tap.GUEST_ADDRESS}/{tap.PREFIX} dev mq0; ip -n mq link set mq0 up"
    )
    virtio = subject.run("basename $(ip netns exec mq readlink /sys/class/net/mq0/device)").strip()
    # /sys is another one in there, and so is what a pattern means.
    queues = int(
        subject.run("ip netns exec mq sh -c 'ls -d /sys/class/net/mq0/queues/rx-*' | wc -l")
    )
    require(queues == vcpus, f"{queues} queues for {vcpus} vCPUs")
    subject.vm.domain.ssh.put("/run/mktme.py", ECHO.encode(), COMMAND_TIMEOUT_S)
    echo = f"ip netns exec mq python3 /run/mktme.py {tap.HOST_ADDRESS}"
    with echo_server(tap.HOST_ADDRESS) as port:
        # What a vCPU sends goes out by its own queue, and comes back by the same (tun.c, automq).
        for vcpu in range(vcpus):
            answer = subject.run(f"taskset -c {vcpu} {echo} {port} {_NETWORK_MIB}").strip()
            require(answer == "same", f"data of vCPU {vcpu} came back {answer}")
    interrupts = subject.run(f"grep -E '{virtio}-(in|out)put' /proc/interrupts").splitlines()
    subject.run("ip netns del mq")
    for queue in range(queues):
        told = [
            sum(map(int, line.split()[1 : 1 + vcpus]))
            for line in interrupts
            if line.endswith(f"{virtio}-input.{queue}")
        ]
        require(len(told) == 1 and told[0] > 0, f"no interrupt of queue {queue}: {interrupts}")
    return f"{queues} queues, interrupts of each; {_NETWORK_MIB} MiB from each vCPU and back"


def _irq_name(subject: Subject, block: str) -> str:
    return subject.run(f"basename $(readlink -f /sys/block/{block}/device)").strip()


def iommu_platform(subject: Subject) -> str:
    """Under an Intel IOMMU, virtio's DMA is by I/O virtual addresses."""
    require(subject.run("ls /sys/class/iommu").split(), "the kernel found no IOMMU")
    device = subject.run(
        "readlink -f /sys/block/$(basename $(readlink /dev/disk/by-id/virtio-mktme-blk))/device"
    ).strip()
    require(_features(subject, device)[_ACCESS_PLATFORM] == "1", "ACCESS_PLATFORM is off")
    group = subject.run(f"cat {device}/../iommu_group/type").strip()
    require(group.startswith("DMA"), f"the disk's IOMMU domain is {group}")
    return f"VIRTIO_F_ACCESS_PLATFORM, domain {group}; " + _round_trip(
        subject, "blk", "/dev/disk/by-id/virtio-mktme-blk"
    )


def sr_iov(subject: Subject) -> str:
    """Virtual functions of an igb, made in the guest; data through one of them and back."""
    pf = subject.run("basename $(dirname /sys/bus/pci/drivers/igb/*/net)").strip()
    subject.run(f"echo 2 >/sys/bus/pci/devices/{pf}/sriov_numvfs; udevadm settle")
    made = subject.run(f"ls -d /sys/bus/pci/devices/{pf}/virtfn* | wc -l").strip()
    require(made == "2", f"{made} virtual functions instead of 2")
    subject.run(
        f"udevadm settle; ip netns add vf; ip link set $(ls /sys/bus/pci/devices/{pf}/virtfn0/net)"
        " netns vf name vf0; ip link set $(ls /sys/bus/pci/devices/"
        f"{pf}/net) up"
    )
    subject.run("ip -n vf addr add 10.0.77.20/24 dev vf0; ip -n vf link set vf0 up")
    subject.vm.domain.ssh.put("/run/mktme.py", ECHO.encode(), COMMAND_TIMEOUT_S)
    # QEMU's user-mode network has the host's loopback interface at .2.
    with echo_server() as port:
        answer = subject.run(f"ip netns exec vf python3 /run/mktme.py 10.0.77.2 {port} 4").strip()
    driver = subject.run("ip netns exec vf ethtool -i vf0").splitlines()[0]
    require("igbvf" in driver, f"the virtual function's {driver}")
    require(answer == "same", f"data through the virtual function came back {answer}")
    subject.run(f"ip netns del vf; echo 0 >/sys/bus/pci/devices/{pf}/sriov_numvfs")
    return "2 VFs; 4 MiB through one and back"


def virtio_crypto(subject: Subject) -> str:
    """The kernel's AES-CBC on virtio-crypto gives the answer of SP 800-38A, F.2.1."""
    subject.run("modprobe -a virtio_crypto algif_skcipher")
    found = subject.python(CRYPTO)
    require(found["right"], f"virtio-crypto encrypts to {found['ciphertext']}")
    return "AES-128-CBC by AF_ALG: SP 800-38A F.2.1"


def edu(subject: Subject) -> str:
    """QEMU's `edu` device copies a page of a user-space program in, and out to another."""
    found = subject.python(EDU)
    require(found["same"], "what the device copied is not what the program wrote")
    require(found["control"], "the page was the same before the device wrote it")
    return "DMA of a page in, and out to another"
