# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that boot from a disk: their layout, seeds and overlays with the real tools.

The root file system is not Debian's here but one of a few files that a fake build makes: the live
tests boot the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from mktme.vm import apt_sources, disk_images, image_cache, images
from mktme.vm.apt_sources import sources_for
from mktme.vm.disk_images import (
    DebPackage,
    DiskImage,
    ensure_disk,
    make_seed,
    overlay,
    packaged_files,
    user_image,
    verify_disk,
)
from mktme.vm.disk_layout import ESP_OFFSET_BYTES, ROOT_OFFSET_BYTES, make_bootable
from mktme.vm.image_cache import RECIPES_DIR, ImageError, UnknownGuestError, known_guests

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA== tester"
RECIPE = """
suite = "trixie"
kernel = "linux-image-amd64"
cmdline = "console=ttyS0"
disk_mib = 48
packages = ["cloud-init", "fio"]
"""

# Stands for mmdebstrap and all else that needs a mirror; the ext4 is real.
BUILD_ROOT = """#!/bin/sh
set -eu
echo "$@" >>{calls}
echo "I: installing"
cat apt.conf mirror.* >/dev/null
echo "linux-image-6.1 6.1.1 amd64" >packages
echo "libc6:amd64 2.36 amd64" >>packages
printf 'Package: linux-image-6.1\\nVersion: 6.1.1\\nArchitecture: amd64\\nSHA256: 11\\n\\n' >index
printf 'Package: libc6\\nVersion: 2.36\\nArchitecture: amd64\\nSHA256: 22\\n\\n' >>index
printf 'Package: libc6\\nVersion: 2.36\\nArchitecture: amd64\\nStatus: installed\\n\\n' >>index
echo "d41d8cd98f00b204e9800998ecf8427e  /bin/true" >md5sums
mke2fs -q -t ext4 -U "$3" -E offset="$4" -d ours disk "$5k"
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def recipes(tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    recipes = tmp_path / "recipes"
    (recipes / "small").mkdir(parents=True)
    (recipes / "small" / "recipe.toml").write_text(RECIPE)
    (recipes / "memory").mkdir()
    (recipes / "memory" / "recipe.toml").write_text('kernel = "linux-image-amd64"')
    script = recipes / "build-root"
    script.write_text(BUILD_ROOT.format(calls=calls))
    script.chmod(0o755)
    monkeypatch.setattr(disk_images, "_BUILD_ROOT", script)
    return recipes


def read_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def debugfs(disk: Path, command: str) -> str:
    ran = subprocess.run(
        ["/usr/sbin/debugfs", "-R", command, f"{disk}?offset={ROOT_OFFSET_BYTES}"],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return ran.stdout


def mcopy(image: str, path: str) -> str:
    command = ["mcopy", "-i", image, f"::{path}", "-"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_disk_has_both_loaders_and_a_root_they_find(recipes: Path, cache: Path) -> None:
    image = ensure_disk("small", recipes=recipes, cache=cache)
    disk = image.disk
    assert disk.stat().st_size == 48 << 20
    mbr = read_at(disk, 0, 512)
    assert mbr[510:] == b"\x55\xaa"
    partitions = [struct.unpack_from("<B3xB3xII", mbr, 446 + 16 * index) for index in range(4)]
    sectors = (48 << 20) // 512
    assert partitions == [
        (0, 0xEF, 2048, 65536),
        (0x80, 0x83, 67584, sectors - 67584),
        (0, 0, 0, 0),
        (0, 0, 0, 0),
    ]
    # boot.img loads the sector whose number it has at 5Ch; what is there loads the rest, from the
    # block list at its end: first sector, count of sectors, segment.
    assert struct.unpack_from("<Q", mbr, 0x5C) == (1,)
    first, count, _segment = struct.unpack_from("<QHH", read_at(disk, 512, 512), 500)
    assert first == 2
    assert (first + count) * 512 <= ESP_OFFSET_BYTES
    efi = subprocess.run(
        ["mcopy", "-i", f"{disk}@@{ESP_OFFSET_BYTES}", "::EFI/BOOT/BOOTX64.EFI", "-"],
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    assert efi[:2] == b"MZ"
    root = root_uuid(disk)
    assert f"search.fs_uuid {root} root".encode() in efi
    # It measures the boot, and passes the log of it on to the kernel.
    assert b"kernel_cmdline: " in efi
    if Path("/usr/lib/grub/x86_64-efi/linuxefi.mod").exists():
        assert b"set efi=efi" in efi
        assert b"linuxefi" in efi
    config = debugfs(disk, "cat /boot/grub/grub.cfg")
    assert f"linux$efi /vmlinuz root=UUID={root} ro console=ttyS0\n" in config
    assert debugfs(disk, "cat /etc/fstab").startswith(f"UUID={root} / ext4 ")
    assert "NoCloud" in debugfs(disk, "cat /etc/cloud/cloud.cfg.d/90_mktme.cfg")


def root_uuid(disk: Path) -> UUID:
    """In the superblock (ext4's s_uuid)."""
    return UUID(bytes=read_at(disk, ROOT_OFFSET_BYTES + 1024 + 0x68, 16))


def test_manifest_is_what_was_installed(recipes: Path, cache: Path, calls: Path) -> None:
    steps: list[str] = []
    image = ensure_disk("small", steps.append, recipes=recipes, cache=cache)
    manifest = verify_disk(image)
    assert manifest == image.manifest
    assert manifest.kernel == DebPackage("linux-image-6.1", "6.1.1", "amd64", "11")
    assert manifest.packages == (DebPackage("libc6", "2.36", "amd64", "22"), manifest.kernel)
    assert manifest.disk_sha256 == sha256(image.disk.read_bytes()).hexdigest()
    assert manifest.files_ours == (
        "/boot/grub/grub.cfg",
        "/etc/cloud/cloud.cfg.d/90_mktme.cfg",
        "/etc/fstab",
        "/etc/hostname",
        "/etc/hosts",
    )
    assert packaged_files(image).read_text().endswith("  /bin/true\n")
    assert steps == ["installing", "GRUB for BIOS and UEFI"]
    assert calls.read_text().startswith("trixie linux-image-amd64,cloud-init,fio ")

    # From the cache: nothing is built, and all is as it was.
    assert ensure_disk("small", steps.append, recipes=recipes, cache=cache) == image
    assert len(steps) == 2
    assert {path.name for path in cache.iterdir()} == {".lock", image.disk.parent.name}
    assert {path.name for path in image.disk.parent.iterdir()} == {
        "disk",
        "manifest.json",
        "md5sums",
    }


def test_loaders_and_uuid_are_the_same_each_time(
    recipes: Path, cache: Path, tmp_path: Path
) -> None:
    one = ensure_disk("small", recipes=recipes, cache=cache)
    other = ensure_disk("small", recipes=recipes, cache=tmp_path / "other")
    assert root_uuid(one.disk) == root_uuid(other.disk)
    assert read_at(one.disk, 0, ESP_OFFSET_BYTES) == read_at(other.disk, 0, ESP_OFFSET_BYTES)


@pytest.mark.parametrize("file", ["small/recipe.toml", "build-root"])
def test_another_recipe_is_another_image(recipes: Path, cache: Path, file: str) -> None:
    before = ensure_disk("small", recipes=recipes, cache=cache)
    with (recipes / file).open("a") as edited:
        edited.write("# edited\n")
    after = ensure_disk("small", recipes=recipes, cache=cache)
    assert after.disk.parent != before.disk.parent


@pytest.mark.parametrize("file", ["disk", "md5sums"])
def test_verify_finds_a_flipped_bit(recipes: Path, cache: Path, file: str) -> None:
    image = ensure_disk("small", recipes=recipes, cache=cache)
    path = image.disk.parent / file
    with path.open("r+b") as damaged:
        damaged.seek(7)
        damaged.write(b"\xff")
    with pytest.raises(ImageError, match=f"{file} has SHA-256") as caught:
        verify_disk(image)
    assert caught.value.hint is not None
    assert str(image.disk.parent) in caught.value.hint


def test_verify_finds_a_missing_disk(recipes: Path, cache: Path) -> None:
    image = ensure_disk("small", recipes=recipes, cache=cache)
    image.disk.unlink()
    with pytest.raises(ImageError, match="No such file"):
        verify_disk(image)


@pytest.mark.parametrize("content", ["{}", "", '{"guest": 1}'])
def test_damaged_manifest_is_a_clear_error(recipes: Path, cache: Path, content: str) -> None:
    image = ensure_disk("small", recipes=recipes, cache=cache)
    (image.disk.parent / "manifest.json").write_text(content)
    with pytest.raises(ImageError, match=r"manifest\.json"):
        ensure_disk("small", recipes=recipes, cache=cache)


def test_kinds_of_guest_are_not_mixed_up(recipes: Path, cache: Path) -> None:
    with pytest.raises(ImageError, match="boots from an initramfs"):
        ensure_disk("memory", recipes=recipes, cache=cache)
    with pytest.raises(ImageError, match="boots from a disk"):
        images.ensure("small", recipes=recipes, cache=cache)
    with pytest.raises(UnknownGuestError, match="other"):
        ensure_disk("other", recipes=recipes, cache=cache)


def test_every_disk_recipe_is_complete() -> None:
    guests = [guest for guest in known_guests() if image_cache.is_disk_guest(guest)]
    assert {"debian-12", "debian-13"} <= set(guests)
    for guest in guests:
        recipe = image_cache.read_recipe(guest, RECIPES_DIR, disk_images._Recipe)
        assert "console=ttyS0" in recipe.cmdline
        assert {"cloud-init", "openssh-server", "sudo"} <= set(recipe.packages)
        assert recipe.disk_mib << 20 > ROOT_OFFSET_BYTES


def test_recipe_with_an_error_is_named(recipes: Path, cache: Path) -> None:
    (recipes / "small" / "recipe.toml").write_text('suite = "trixie"')
    with pytest.raises(ImageError, match=r"recipe\.toml.*kernel"):
        ensure_disk("small", recipes=recipes, cache=cache)


def test_failed_build_leaves_nothing(recipes: Path, cache: Path) -> None:
    script = recipes / "build-root"
    script.write_text("#!/bin/sh\nmount -t tmpfs none ours\necho E: no mirror\nexit 3\n")
    with pytest.raises(ImageError, match="build-root: E: no mirror"):
        ensure_disk("small", recipes=recipes, cache=cache)
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_package_that_is_not_in_apts_index(recipes: Path, cache: Path) -> None:
    script = recipes / "build-root"
    script.write_text(script.read_text().replace("SHA256: 22", "Size: 22"))
    with pytest.raises(ImageError, match=r"no libc6 2\.36"):
        ensure_disk("small", recipes=recipes, cache=cache)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_ended_build_takes_all_its_processes_along(
    recipes: Path, cache: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    """Whether it is interrupted or killed; what it leaves in the cache the next build removes."""
    script = recipes / "build-root"
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    # The pipe ends when the last process that has it open is gone.
    genuine = script.read_text()
    script.write_text(f"#!/bin/sh\nexec >{fifo}\necho up\n(sleep 600 & sleep 600)\n")
    code = f"""
from pathlib import Path
from mktme.vm import disk_images
disk_images._BUILD_ROOT = Path({str(script)!r})
disk_images.ensure_disk("small", recipes=Path({str(recipes)!r}), cache=Path({str(cache)!r}))
"""
    builder = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    with fifo.open() as alive:
        assert alive.readline() == "up\n"
        builder.send_signal(sent)
        assert alive.readline() == ""
    builder.wait(timeout=20)
    leftovers = [path for path in cache.iterdir() if path.name.startswith(".build-")]
    assert len(leftovers) == (sent is signal.SIGKILL)

    script.write_text(genuine)
    image = ensure_disk("small", recipes=recipes, cache=cache)
    assert {path.name for path in cache.iterdir()} == {".lock", image.disk.parent.name}


def test_missing_grub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mktme.vm.disk_layout._GRUB_DIR", tmp_path)
    with pytest.raises(ImageError, match="GRUB cannot be read") as caught:
        make_bootable(tmp_path / "disk", UUID(int=1), tmp_path)
    assert caught.value.hint is not None
    assert "grub-pc-bin" in caught.value.hint


def bootable(path: Path, size: int = 1 << 20) -> Path:
    path.write_bytes(b"\x55\xaa".rjust(512, b"\0").ljust(size, b"\0"))
    return path


def qemu_img(*arguments: str | Path) -> None:
    command = ["qemu-img", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_overlay_leaves_the_base_alone(tmp_path: Path) -> None:
    base = user_image(bootable(tmp_path / "base.raw"))
    before = base.disk.read_bytes()
    disk = overlay(base, tmp_path / "disk.qcow2")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 4096", str(disk)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    info = subprocess.run(
        ["qemu-img", "info", "--output=json", str(disk)], check=True, stdout=subprocess.PIPE
    )
    assert json.loads(info.stdout)["full-backing-filename"] == str(base.disk)
    assert json.loads(info.stdout)["backing-filename-format"] == "raw"
    assert base.disk.read_bytes() == before
    with pytest.raises(ImageError, match="already"):
        overlay(base, disk)


def test_users_own_images(tmp_path: Path) -> None:
    raw = bootable(tmp_path / "base.raw")
    qcow2 = tmp_path / "base.img"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, qcow2)
    gpt = tmp_path / "gpt.raw"
    gpt.write_bytes(b"EFI PART".rjust(520, b"\0").ljust(1 << 20, b"\0"))
    assert user_image(raw) == DiskImage("base.raw", raw, "raw", None)
    assert user_image(qcow2) == DiskImage("base.img", qcow2, "qcow2", None)
    assert user_image(gpt).format == "raw"
    for function in (verify_disk, packaged_files):
        with pytest.raises(ImageError, match="your own image"):
            function(user_image(raw))


def test_users_image_that_a_guest_runs_from(tmp_path: Path) -> None:
    """QEMU locks what it has open."""
    raw = bootable(tmp_path / "base.raw")
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", "-i", "threads", str(raw)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    ) as user:
        assert user_image(raw).format == "raw"
        user.communicate(b"quit\n")


def bad_image(kind: str, directory: Path) -> Path:
    path = directory / "user.qcow2"
    base = bootable(directory / "base.raw")
    if kind == "directory":
        path.mkdir()
    elif kind == "other format":
        qemu_img("convert", "-f", "raw", "-O", "vmdk", base, path)
    elif kind == "no qcow2":
        bootable(path)
    elif kind == "backing file":
        qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", path)
    elif kind == "data file":
        qemu_img("create", "-f", "qcow2", "-o", f"data_file={directory / 'data'}", path, "1M")
    elif kind == "not bootable":
        qemu_img("create", "-f", "qcow2", path, "1M")
    elif kind == "empty":
        path = directory / "user.raw"
        path.touch()
    elif kind == "cut":
        qemu_img("convert", "-f", "raw", "-O", "qcow2", base, path)
        os.truncate(path, 100)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("directory", "not a file"),
        ("other format", "a vmdk image"),
        ("no qcow2", "no qcow2 image"),
        ("backing file", r"needs .*base\.raw"),
        ("data file", "needs .*data"),
        ("not bootable", "no partition table"),
        ("empty", "no partition table"),
        ("cut", "qcow2"),
    ],
)
def test_users_image_that_cannot_be_used(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        user_image(bad_image(kind, tmp_path))
    assert caught.value.hint is not None


def test_seed_is_what_cloud_init_wants(tmp_path: Path) -> None:
    seed = tmp_path / "seed"
    make_seed(seed, hostname="alice", user="tester", public_keys=[KEY + "\n"])
    label = subprocess.run(
        ["/usr/sbin/blkid", "-p", "-s", "LABEL", "-o", "value", seed],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert label.stdout == "CIDATA\n"
    meta_data = json.loads(mcopy(str(seed), "meta-data"))
    assert meta_data["local-hostname"] == "alice"
    header, _, user_data = mcopy(str(seed), "user-data").partition("\n")
    assert header == "#cloud-config"
    config = json.loads(user_data)
    assert config["users"] == [
        {
            "name": "tester",
            "shell": "/bin/bash",
            "lock_passwd": True,
            "sudo": "ALL=(ALL) NOPASSWD:ALL",
            "ssh_authorized_keys": [KEY],
        }
    ]
    assert config["ssh_pwauth"] is config["package_update"] is config["package_upgrade"] is False
    network = json.loads(mcopy(str(seed), "network-config"))
    assert network["ethernets"]["e*"]["dhcp4"] is True

    other = tmp_path / "other"
    make_seed(other, hostname="alice", user="tester", public_keys=[KEY])
    assert json.loads(mcopy(str(other), "meta-data"))["instance-id"] != meta_data["instance-id"]
    with pytest.raises(ImageError, match="already"):
        make_seed(other, hostname="alice", user="tester", public_keys=[KEY])


@pytest.mark.parametrize(
    "wrong",
    [
        {"hostname": ""},
        {"hostname": "a b"},
        {"hostname": "-a"},
        {"hostname": "a\n"},
        {"user": "Root"},
        {"user": "a:b"},
        {"public_keys": [""]},
        {"public_keys": [KEY, "-----BEGIN OPENSSH PRIVATE KEY-----"]},
        {"public_keys": [f"{KEY}\n{KEY}"]},
    ],
)
def test_seed_with_a_malformed_name(tmp_path: Path, wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"hostname": "alice", "user": "tester", "public_keys": [KEY]}
    arguments |= wrong
    with pytest.raises(ValueError, match=r"no host name|no user name|one line"):
        make_seed(tmp_path / "seed", **arguments)
    assert not (tmp_path / "seed").exists()


SOURCES = """\
# The site's own.
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm
 bookworm-updates
Components: main contrib
Signed-By: /etc/site.gpg

Types: deb
URIs: http://mirror.example/security
Suites: oldstable-security
Components: main
Trusted: yes
"""


def test_mirror_is_the_machines_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deb822, one_line = tmp_path / "debian.sources", tmp_path / "more.list"
    deb822.write_text(SOURCES)
    one_line.write_text("\ndeb [signed-by=/etc/bookworm.gpg] http://b.example bookworm main\n")
    targets = f"""\
bookworm bookworm {deb822}:1
bookworm-updates bookworm-updates {deb822}:1
bookworm-security oldstable-security {deb822}:2
bookworm-backports bookworm-backports {deb822}:3
bookworm bookworm {one_line}:2
"""
    (tmp_path / "apt-get").write_text(f"#!/bin/sh\ncat <<'END'\n{targets}END\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(apt_sources, "host_release", lambda: "debian bookworm")
    found = sources_for("trixie")
    assert found.deb822 == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie trixie-updates\n"
        "Components: main contrib\nSigned-By: /etc/site.gpg\n\n"
        "Types: deb\nURIs: http://mirror.example/security\nSuites: trixie-security\n"
        "Components: main\nTrusted: yes"
    )
    assert found.one_line == "deb [signed-by=/etc/bookworm.gpg] http://b.example trixie main"


def test_machine_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apt-get").write_text("#!/bin/sh\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ImageError, match="no index") as caught:
        sources_for("trixie")
    assert caught.value.hint is not None
    assert "apt-get update" in caught.value.hint
