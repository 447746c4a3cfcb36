# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest images, built from small packages that a fake apt serves."""

from __future__ import annotations

import dataclasses
import lzma
import os
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest

from mktme.vm import images
from mktme.vm.image_cache import is_disk_guest, read_recipe
from mktme.vm.images import ImageError, UnknownGuestError, cache_dir, ensure, known_guests, verify

KERNEL = bytes(range(256)) * 16
BUSYBOX = b"\x7fELF busybox"
LINKER = b"\x7fELF linker"
LIBC = b"\x7fELF libc"
RECIPE = """
kernel = "linux-image-amd64"
cmdline = "console=ttyS0"
modules = ["virtio_balloon"]
[packages]
"bin/busybox" = "busybox-static"
"lib/ld.so.2" = "libc6"
"lib/libc.so.6" = "libc6"
[files]
"init" = "init"
"bin/canary" = "canary"
"""


def module(depends: str) -> bytes:
    """What of a kernel module tells on what others it depends (.modinfo)."""
    return f"\x7fELF\0license=GPL\0depends={depends}\0name=x\0".encode()


# A module's file may be named with hyphens, and what it depends on is not.
MODULE_DIR = "lib/modules/6.1.0-10-amd64"
MODULES = {
    "drivers/virtio/virtio_balloon.ko": module("virtio,virtio_ring"),
    "drivers/virtio/virtio-ring.ko": module(""),
    "drivers/virtio/virtio.ko": module("virtio_ring"),
    "drivers/char/virtio-rng.ko": module("virtio,virtio_ring"),
}

FAKE_APT_CACHE = """#!/bin/sh
echo "$@" >>{root}/calls
cat {root}/index/"$2"
"""
FAKE_APT_GET = """#!/bin/sh
echo "$@" >>{root}/calls
for wanted; do :; done
cp {root}/pool/"$wanted" "${{wanted%%=*}}_1%3a${{wanted#*=}}_amd64.deb"
"""


@dataclass
class FakeApt:
    """An archive of packages, with the two apt commands that find and fetch them."""

    root: Path

    def __post_init__(self) -> None:
        for name in ("bin", "index", "pool"):
            (self.root / name).mkdir(parents=True)
        for tool, script in (("apt-cache", FAKE_APT_CACHE), ("apt-get", FAKE_APT_GET)):
            path = self.root / "bin" / tool
            path.write_text(script.format(root=self.root))
            path.chmod(0o755)

    def add(self, name: str, version: str, files: dict[str, bytes], depends: str = "") -> None:
        tree = self.root / "tree"
        for path, data in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(data)
        (tree / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\n"
        control += "Maintainer: Test <test@example.org>\nDescription: test\n"
        (tree / "DEBIAN/control").write_text(control)
        deb = self.root / "pool" / f"{name}={version}"
        command = ["dpkg-deb", "--root-owner-group", "-Zgzip", "--build", str(tree), str(deb)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(tree)
        with (self.root / "index" / name).open("a") as index:
            index.write(f"Package: {name}\nVersion: {version}\nDepends: {depends}\n")
            index.write(f"SHA256: {sha256(deb.read_bytes()).hexdigest()}\n\n")

    def calls(self) -> list[str]:
        log = self.root / "calls"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApt:
    apt = FakeApt(tmp_path / "apt")
    monkeypatch.setenv("PATH", f"{apt.root}/bin:{os.environ['PATH']}")
    for abi, version in (("9", "6.1.9-1"), ("10", "6.1.10-1"), ("12", "6.12-1~bpo12+1")):
        kernel = f"linux-image-6.1.0-{abi}-amd64"
        modules = {
            f"{MODULE_DIR.replace('10', abi)}/kernel/{path}": data for path, data in MODULES.items()
        }
        vmlinuz = {f"boot/vmlinuz-6.1.0-{abi}-amd64": KERNEL + abi.encode()}
        apt.add(kernel, version, vmlinuz | modules)
        apt.add("linux-image-amd64", version, {}, depends=f"{kernel} (= {version})")
    apt.add("busybox-static", "1.35-4", {"bin/busybox": BUSYBOX})
    apt.add("libc6", "2.36-9", {"lib/ld.so.2": LINKER, "usr/lib/libc.so.6": LIBC})
    return apt


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    recipe = tmp_path / "recipes" / "small"
    recipe.mkdir(parents=True)
    (recipe / "recipe.toml").write_text(RECIPE)
    (recipe / "init").write_text("#!/bin/sh\n")
    (recipe / "canary").write_text("#!/bin/sh\necho canary\n")
    return recipe.parent


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def read_newc(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Parse a newc cpio archive into path -> (mode, content)."""
    members: dict[str, tuple[int, bytes]] = {}
    position = 0
    while True:
        header = archive[position : position + 110]
        assert header[:6] == b"070701"
        fields = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[position + 110 : position + 109 + name_size].decode()
        start = (position + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return members
        members[name] = (mode, archive[start : start + size])
        position = (start + size + 3) & ~3


def test_boots_the_files_of_the_releases_newest_kernel(
    apt: FakeApt, recipes: Path, cache: Path
) -> None:
    image = ensure("small", recipes=recipes, cache=cache)

    # Not 6.1.9, which sorts higher as text, and not 6.12 from backports.
    assert image.manifest.kernel.version == "6.1.10-1"
    assert image.kernel.read_bytes() == KERNEL + b"10"
    assert image.cmdline == "console=ttyS0"
    members = read_newc(image.initrd.read_bytes())
    for path in [path for path in members if path.startswith("lib/modules")]:
        del members[path]  # shown below
    assert members == {
        "bin": (stat.S_IFDIR | 0o755, b""),
        "lib": (stat.S_IFDIR | 0o755, b""),
        "bin/sh": (stat.S_IFLNK | 0o777, b"busybox"),
        "bin/busybox": (stat.S_IFREG | 0o755, BUSYBOX),
        "bin/canary": (stat.S_IFREG | 0o755, b"#!/bin/sh\necho canary\n"),
        "init": (stat.S_IFREG | 0o755, b"#!/bin/sh\n"),
        # One of them is below /usr in its package.
        "lib/ld.so.2": (stat.S_IFREG | 0o755, LINKER),
        "lib/libc.so.6": (stat.S_IFREG | 0o755, LIBC),
    }
    assert list(members) == [
        "bin",
        "lib",
        "bin/sh",
        *sorted(members.keys() - {"bin", "lib", "bin/sh"}),
    ]


def test_modules_come_with_what_they_depend_on(apt: FakeApt, recipes: Path, cache: Path) -> None:
    image = ensure("small", recipes=recipes, cache=cache)
    members = read_newc(image.initrd.read_bytes())
    files = {
        path.removeprefix(f"{MODULE_DIR}/"): data
        for path, (mode, data) in members.items()
        if path.startswith(MODULE_DIR) and stat.S_ISREG(mode)
    }
    needed = {path: data for path, data in MODULES.items() if "virtio-rng" not in path}
    # In the order of depmod(8): what has to be loaded first comes last.
    told = """\
kernel/drivers/virtio/virtio-ring.ko:
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio-ring.ko
kernel/drivers/virtio/virtio_balloon.ko: kernel/drivers/virtio/virtio.ko \
kernel/drivers/virtio/virtio-ring.ko
"""
    assert files.pop("modules.dep").decode() == told
    assert files == {f"kernel/{path}": data for path, data in needed.items()}
    manifest = verify(image, recipes=recipes)
    assert {one.name for one in manifest.modules} == {"linux-image-6.1.0-10-amd64"}
    assert {one.member_sha256 for one in manifest.modules} == {
        sha256(data).hexdigest() for data in needed.values()
    }


def test_compressed_modules_are_left_so(apt: FakeApt, recipes: Path, cache: Path) -> None:
    """As in Debian 13: below /usr, and .ko.xz."""
    kernel, version = "linux-image-6.12.1-amd64", "6.12.1-1"
    directory = "lib/modules/6.12.1-amd64/kernel/drivers"
    balloon, ring = lzma.compress(module("virtio_ring")), lzma.compress(module(""))
    modules = {
        f"usr/{directory}/virtio_balloon.ko.xz": balloon,
        f"usr/{directory}/virtio_ring.ko.xz": ring,
    }
    apt.add(kernel, version, {"boot/vmlinuz-6.12.1-amd64": KERNEL} | modules)
    apt.add("linux-image-amd64", version, {}, depends=f"{kernel} (= {version})")
    image = ensure("small", recipes=recipes, cache=cache)
    verify(image, recipes=recipes)
    members = read_newc(image.initrd.read_bytes())
    assert members[f"{directory}/virtio_balloon.ko.xz"][1] == balloon
    assert members[f"{directory}/virtio_ring.ko.xz"][1] == ring


def test_module_that_the_kernel_does_not_have(apt: FakeApt, recipes: Path, cache: Path) -> None:
    recipe = recipes / "small" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("virtio_balloon", "virtio_none"))
    with pytest.raises(ImageError, match="no kernel module virtio_none") as caught:
        ensure("small", recipes=recipes, cache=cache)
    assert caught.value.hint is not None
    assert "built into" in caught.value.hint


@pytest.mark.parametrize("index", [0, 1, 2])
def test_verify_finds_a_manifest_without_one_of_the_modules(
    apt: FakeApt, recipes: Path, cache: Path, index: int
) -> None:
    image = ensure("small", recipes=recipes, cache=cache)
    modules = image.manifest.modules
    fewer = dataclasses.replace(image.manifest, modules=modules[:index] + modules[index + 1 :])
    (image.kernel.parent / "manifest.json").write_bytes(msgspec.json.encode(fewer))
    with pytest.raises(ImageError, match="modules of the recipe"):
        verify(ensure("small", recipes=recipes, cache=cache), recipes=recipes)


def test_verify_finds_a_module_that_is_not_the_packages(
    apt: FakeApt, recipes: Path, cache: Path
) -> None:
    image = ensure("small", recipes=recipes, cache=cache)
    altered = image.initrd.read_bytes().replace(b"name=x", b"name=y", 1)
    image.initrd.write_bytes(altered)
    with pytest.raises(ImageError, match="initrd has SHA-256"):
        verify(image, recipes=recipes)


def test_cached_image_needs_no_apt(apt: FakeApt, recipes: Path, cache: Path) -> None:
    steps: list[str] = []
    built = ensure("small", steps.append, recipes=recipes, cache=cache)
    assert len(steps) == 3
    calls = apt.calls()

    assert ensure("small", steps.append, recipes=recipes, cache=cache) == built
    assert len(steps) == 3
    assert apt.calls() == calls != []


@pytest.mark.parametrize("file", ["recipe.toml", "init", "canary"])
def test_another_recipe_is_another_image(
    apt: FakeApt, recipes: Path, cache: Path, file: str
) -> None:
    before = ensure("small", recipes=recipes, cache=cache)
    with (recipes / "small" / file).open("a") as edited:
        edited.write("# edited\n")
    assert ensure("small", recipes=recipes, cache=cache).kernel.parent != before.kernel.parent


def test_initramfs_is_reproducible(
    apt: FakeApt, recipes: Path, cache: Path, tmp_path: Path
) -> None:
    one = ensure("small", recipes=recipes, cache=cache)
    other = ensure("small", recipes=recipes, cache=tmp_path / "other")
    assert one.initrd.read_bytes() == other.initrd.read_bytes()


def test_verify_returns_the_hashes_of_what_is_booted(
    apt: FakeApt, recipes: Path, cache: Path
) -> None:
    image = ensure("small", recipes=recipes, cache=cache)
    manifest = verify(image, recipes=recipes)
    assert manifest.kernel.member_sha256 == sha256(image.kernel.read_bytes()).hexdigest()
    assert [(one.name, one.path, one.member_sha256) for one in manifest.files] == [
        ("busybox-static", "bin/busybox", sha256(BUSYBOX).hexdigest()),
        ("libc6", "lib/ld.so.2", sha256(LINKER).hexdigest()),
        ("libc6", "lib/libc.so.6", sha256(LIBC).hexdigest()),
    ]


@pytest.mark.parametrize(
    "file",
    ["vmlinuz", "initrd", "linux-image-6.1.0-10-amd64.deb", "busybox-static.deb", "libc6.deb"],
)
def test_verify_finds_a_flipped_bit(apt: FakeApt, recipes: Path, cache: Path, file: str) -> None:
    image = ensure("small", recipes=recipes, cache=cache)
    path = image.kernel.parent / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ImageError, match=file):
        verify(image, recipes=recipes)


def test_verify_finds_a_manifest_that_names_another_kernel(
    apt: FakeApt, recipes: Path, cache: Path
) -> None:
    image = ensure("small", recipes=recipes, cache=cache)
    path = image.kernel.parent / "manifest.json"
    genuine = image.manifest.kernel.member_sha256
    path.write_text(path.read_text().replace(genuine, sha256(b"").hexdigest()))
    with pytest.raises(ImageError, match=r"manifest\.json is wrong"):
        verify(ensure("small", recipes=recipes, cache=cache), recipes=recipes)


def test_verify_finds_a_manifest_without_one_of_the_files(
    apt: FakeApt, recipes: Path, cache: Path
) -> None:
    image = ensure("small", recipes=recipes, cache=cache)
    path = image.kernel.parent / "manifest.json"
    fewer = dataclasses.replace(image.manifest, files=image.manifest.files[1:])
    path.write_bytes(msgspec.json.encode(fewer))
    with pytest.raises(ImageError, match="files of the recipe"):
        verify(ensure("small", recipes=recipes, cache=cache), recipes=recipes)


def test_verify_finds_a_missing_package(apt: FakeApt, recipes: Path, cache: Path) -> None:
    image = ensure("small", recipes=recipes, cache=cache)
    (image.kernel.parent / "busybox-static.deb").unlink()
    with pytest.raises(ImageError, match=r"busybox-static\.deb") as caught:
        verify(image, recipes=recipes)
    assert caught.value.hint is not None
    assert str(image.kernel.parent) in caught.value.hint


def test_damaged_manifest_is_a_clear_error(apt: FakeApt, recipes: Path, cache: Path) -> None:
    image = ensure("small", recipes=recipes, cache=cache)
    (image.kernel.parent / "manifest.json").write_text("{}")
    with pytest.raises(ImageError, match=r"manifest\.json"):
        ensure("small", recipes=recipes, cache=cache)


def test_package_unlike_the_index_is_refused(apt: FakeApt, recipes: Path, cache: Path) -> None:
    with (apt.root / "pool" / "busybox-static=1.35-4").open("ab") as deb:
        deb.write(b"\0")
    with pytest.raises(ImageError, match="not the package in apt's index"):
        ensure("small", recipes=recipes, cache=cache)
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_package_that_no_source_has(apt: FakeApt, recipes: Path, cache: Path) -> None:
    (apt.root / "index" / "busybox-static").write_text("")
    with pytest.raises(ImageError, match="busybox-static") as caught:
        ensure("small", recipes=recipes, cache=cache)
    assert caught.value.hint is not None
    assert "apt-get update" in caught.value.hint


def test_apts_complaint_is_passed_on(apt: FakeApt, recipes: Path, cache: Path) -> None:
    (apt.root / "pool" / "busybox-static=1.35-4").unlink()
    with pytest.raises(ImageError, match="No such file"):
        ensure("small", recipes=recipes, cache=cache)


def test_package_without_the_file(apt: FakeApt, recipes: Path, cache: Path) -> None:
    recipe = recipes / "small" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("lib/libc.so.6", "lib/libc.so.7"))
    with pytest.raises(ImageError, match=r"libc6\.deb has no file .*libc.*7"):
        ensure("small", recipes=recipes, cache=cache)


def test_other_distribution_is_told_so(
    recipes: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ImageError, match="apt-cache is missing") as caught:
        ensure("small", recipes=recipes, cache=cache)
    assert caught.value.hint is not None
    assert "Debian" in caught.value.hint


def test_what_a_killed_build_left_is_removed(apt: FakeApt, recipes: Path, cache: Path) -> None:
    leftover = cache / ".build-killed"
    leftover.mkdir(parents=True)
    (leftover / "vmlinuz").write_bytes(KERNEL)
    image = ensure("small", recipes=recipes, cache=cache)
    assert {path.name for path in cache.iterdir()} == {".lock", image.kernel.parent.name}


def test_builders_at_the_same_time_build_once(apt: FakeApt, recipes: Path, cache: Path) -> None:
    with ThreadPoolExecutor() as pool:
        builds = [pool.submit(ensure, "small", recipes=recipes, cache=cache) for _ in range(4)]
    assert len({build.result() for build in builds}) == 1
    assert sum("download" in call for call in apt.calls()) == 3


def test_cache_that_cannot_be_written(apt: FakeApt, recipes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="File exists"):
        ensure("small", recipes=recipes, cache=tmp_path / "file")


@pytest.mark.parametrize("name", ["", "big", "../small", "small/"])
def test_unknown_guest_names_the_known_ones(recipes: Path, cache: Path, name: str) -> None:
    with pytest.raises(UnknownGuestError) as caught:
        ensure(name, recipes=recipes, cache=cache)
    assert caught.value.known == ("small",)
    assert caught.value.hint == "known guests: small"


def test_recipe_with_an_error_is_named(apt: FakeApt, recipes: Path, cache: Path) -> None:
    (recipes / "small" / "recipe.toml").write_text('kernel = "linux-image-amd64"')
    with pytest.raises(ImageError, match=r"recipe\.toml.*cmdline"):
        ensure("small", recipes=recipes, cache=cache)


@pytest.mark.parametrize(
    ("xdg", "expected"),
    [
        ("/var/tmp/x", "/var/tmp/x/mktme/images"),
        ("", "/home/a/.cache/mktme/images"),
        # "All paths set in these environment variables must be absolute", says the specification.
        ("relative", "/home/a/.cache/mktme/images"),
    ],
)
def test_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, xdg: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert cache_dir() == Path(expected)


def test_every_recipe_is_complete() -> None:
    guests = known_guests()
    assert "tiny" in guests
    for guest in guests:
        if is_disk_guest(guest):
            continue
        directory = images.RECIPES_DIR / guest
        recipe = read_recipe(guest, images.RECIPES_DIR, images._Recipe)
        for script in recipe.files.values():
            subprocess.run(["sh", "-n", str(directory / script)], check=True)


def run_guest_script(name: str, directory: Path, *args: str, **replace: str) -> list[str]:
    """Run one of tiny's scripts here, with this machine's own tools in place of busybox."""
    script = (images.RECIPES_DIR / "tiny" / name).read_text()
    script = script.replace("/tmp", str(directory)).replace("/run", str(directory))
    for old, new in replace.items():
        assert old in script
        script = script.replace(old, new)
    ran = subprocess.run(
        ["sh", "-c", script, name, *args], check=False, stdout=subprocess.PIPE, text=True
    )
    assert (ran.returncode == 0) == ("FAILED" not in ran.stdout)
    return ran.stdout.splitlines()


def test_workload_expects_what_other_tools_compute(tmp_path: Path) -> None:
    *sums, done = run_guest_script("workload", tmp_path, "2")
    assert done == "@mktme workload done"
    parts = [line.split()[2] for line in sums]
    assert parts == ["stream", "copy", "compress", "sorted", "processes"] * 2


def test_workload_finds_an_error(tmp_path: Path) -> None:
    lines = run_guest_script("workload", tmp_path, cmp="printf x | dd conv=notrunc of=copy; cmp")
    assert lines[-1] == "@mktme workload FAILED copy"


def test_canary_fills_a_page(tmp_path: Path) -> None:
    # Bytes that a shell could mistake for something else: NUL, newline, percent, backslash.
    value = b"\0\n%\\" + bytes(range(196, 256))
    (line,) = run_guest_script("canary", tmp_path, value.hex())
    page = (tmp_path / "canary").read_bytes()
    assert page == value * 64
    assert line == f"@mktme canary sha256 {sha256(page).hexdigest()}"


@pytest.mark.parametrize("value", ["", "00" * 63, "00" * 65, "0" * 127 + "g"])
def test_canary_refuses_what_is_no_line(tmp_path: Path, value: str) -> None:
    (line,) = run_guest_script("canary", tmp_path, value)
    assert line == "@mktme canary FAILED: want 128 hexadecimal digits"


GOT = "got  64MB (67108864 bytes), trying mlock ...locked.\n"
STUCK = "  Stuck Address       :            \b\b\b\b\b\b\b\b\b\b\bsetting   0\b\b\b\bok\n"
RANDOM = "  Random Value        :  \b|\b/\b-\b\\\b ok\n"
XOR = "  Compare XOR         : ok\n"
FAILURE = "FAILURE: 0x9430c52583ba9796 != 0x9430c52583c28786 at offset 0x0000000000000000."


def verify_memory(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    *args: str,
    says: str,
    status: int = 0,
    mask: str | None = None,
) -> tuple[str, list[str]]:
    """Run `verify-memory` with a memtester that says what 4.6.0 would.

    Returns:
        What it reports, and the arguments and test mask that memtester was given.
    """
    (directory / "says").write_text(says)
    program = directory / "memtester"
    program.write_text(
        f'#!/bin/sh\necho "$@" "$MEMTESTER_TEST_MASK" >{directory}/given\n'
        f"cat {directory}/says\nexit {status}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    if mask is None:
        monkeypatch.delenv("MEMTESTER_TEST_MASK", raising=False)
    else:
        monkeypatch.setenv("MEMTESTER_TEST_MASK", mask)
    (line,) = run_guest_script("verify-memory", directory, *args)
    given = directory / "given"
    return line, given.read_text().split() if given.exists() else []


def test_verify_memory_reports_what_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = STUCK + RANDOM + XOR
    says = f"{GOT}Loop 1/2:\n{loop}Loop 2/2:\n{loop}\nDone.\n"
    line, given = verify_memory(tmp_path, monkeypatch, "64", "2", says=says)
    assert line == "@mktme memory verified 64 MiB, 6 tests"
    assert given == ["64", "2"]


@pytest.mark.parametrize(
    ("says", "status", "reason"),
    [
        (f"{GOT}{STUCK}  Random Value        : {FAILURE}\n{FAILURE}\n", 4, FAILURE),
        # One that comes last, after all that is well.
        (f"{GOT}{STUCK}{RANDOM}{FAILURE}\n", 4, FAILURE),
        (GOT + STUCK + RANDOM, 4, "memtester exited with 4"),
        (GOT + STUCK, 137, "memtester exited with 137"),
        (GOT, 0, "memtester exited with 0"),
        (GOT.replace("64MB", "36MB") + STUCK + RANDOM, 0, "no 64 MiB to be had"),
        (GOT.replace("locked", "insufficient permission") + STUCK, 0, "no 64 MiB to be had"),
        ("", 127, "no 64 MiB to be had"),
    ],
)
def test_verify_memory_fails_unless_all_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, status: int, reason: str
) -> None:
    line, _given = verify_memory(tmp_path, monkeypatch, "64", says=says, status=status)
    assert line == f"@mktme memory FAILED: {reason}"


@pytest.mark.parametrize(("mask", "given"), [("0x82", ["131"]), ("1", ["1"]), (None, [])])
def test_verify_memory_always_runs_the_test_that_others_rely_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str | None, given: list[str]
) -> None:
    line, arguments = verify_memory(
        tmp_path, monkeypatch, "64", says=GOT + STUCK + RANDOM, mask=mask
    )
    assert line == "@mktme memory verified 64 MiB, 2 tests"
    assert arguments == ["64", "1", *given]


@pytest.mark.parametrize("args", [(), ("0",), ("x",), ("64M",), ("-1",), ("64", "0"), ("64", "x")])
def test_verify_memory_refuses_what_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    line, given = verify_memory(tmp_path, monkeypatch, *args, says=GOT + STUCK + RANDOM)
    assert line == "@mktme memory FAILED: want a number of MiB, and one of loops"
    assert given == []
