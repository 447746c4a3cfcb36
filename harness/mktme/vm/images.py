# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest images: built from Debian's own packages, kept in a cache, shown to be unmodified.

A recipe (``guest-images/NAME/recipe.toml``) names the packages, the kernel command line, kernel
modules and a few files of ours. What is booted is the package's kernel, byte for byte, and an
initramfs of the packages' busybox, programs and libraries and of the kernel package's modules, as
they are, and our files. Packages come through the machine's own apt sources, and their SHA-256 is
the one in the index that apt has authenticated.

Modules come with those that they depend on, and with the ``modules.dep`` that modprobe(8) wants:
a kernel package has none (its postinst runs depmod), so it is made of what each module's .modinfo
section says. Debian 12 has modules as .ko; Debian 13 compresses them, and they stay that way
(.ko.xz): what loads them has to know how, or the kernel (CONFIG_MODULE_DECOMPRESS).

These guests boot from memory; those that boot from a disk are in `mktme.vm.disk_images`.
"""

from __future__ import annotations

import functools
import hashlib
import re
import stat
import subprocess
import sys
import tarfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mktme.engine.errors import MktmeError
from mktme.vm.disk_images import DiskImage, DiskManifest, ensure_disk, verify_disk
from mktme.vm.image_cache import (
    APT_HINT,
    RECIPES_DIR,
    ImageError,
    Progress,
    UnknownGuestError,
    build_key,
    cache_dir,
    damaged,
    ensure_built,
    host_release,
    is_disk_guest,
    known_guests,
    read_recipe,
    run_tool,
)
from mktme.vm.kernel_modules import depends_on, is_closure, module_files, module_name

__all__ = [
    "RECIPES_DIR",
    "GuestImage",
    "ImageError",
    "Manifest",
    "Package",
    "UnknownGuestError",
    "cache_dir",
    "ensure",
    "known_guests",
    "verify",
]

_FORMAT = 3
"""Part of every image's key: raise it when this module builds something else from a recipe."""

_KERNEL_MEMBER = r"\./boot/vmlinuz-[^/]+"
# Debian 13 has below /usr what Debian 12 had in / as well.
_ROOT_MEMBER = r"\./(usr/)?"
_MODULE_MEMBER = _ROOT_MEMBER + r"lib/modules/[^/]+/.+/(NAMES)\.ko(\.xz)?"


@dataclass(frozen=True, slots=True)
class Package:
    """A Debian package, and a file of it that is booted."""

    name: str
    version: str
    sha256: str
    """Of the .deb, as apt's authenticated index had it when the image was built."""
    member: str
    """Path of the file in the package."""
    member_sha256: str

    @property
    def deb(self) -> str:
        """File name of the .deb in the image's directory."""
        return f"{self.name}.deb"

    @property
    def path(self) -> str:
        """Where the file is in the initramfs, which has no /usr of its own."""
        return re.sub(rf"^{_ROOT_MEMBER}", "", self.member)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an image was built from; ``manifest.json`` beside it.

    Attributes:
        files: what of the initramfs is not ours, but for kernel modules.
        modules: kernel modules, of the kernel's package.
    """

    guest: str
    release: str
    cmdline: str
    kernel: Package
    files: tuple[Package, ...]
    modules: tuple[Package, ...] = ()


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A guest that is ready to boot."""

    name: str
    kernel: Path
    initrd: Path
    cmdline: str
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class _Recipe:
    """``recipe.toml``.

    Attributes:
        kernel: a metapackage that depends on the kernel's.
        packages: path in the initramfs to the package that has the file there, or below /usr.
        files: path in the initramfs to a file beside the recipe.
        modules: names of kernel modules; those that they depend on come along.
    """

    kernel: str
    cmdline: str
    packages: dict[str, str]
    files: dict[str, str]
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _IndexEntry:
    """One version of a package in apt's index."""

    name: str
    version: str
    sha256: str
    depends: str


def ensure(
    name: str,
    progress: Progress | None = None,
    *,
    recipes: Path = RECIPES_DIR,
    cache: Path | None = None,
) -> GuestImage:
    """Return guest `name`, building its image if the cache has none for its recipe.

    An image is keyed by its recipe and the Debian release, not by package versions: once built it
    is found without apt or network, and its manifest says which versions it holds.

    Args:
        name: the recipe's name.
        progress: called with one line for each step of a build, not at all for a cached image.
        recipes: directory of recipes.
        cache: directory of images; default is `cache_dir()`.

    Raises:
        UnknownGuestError: there is no such recipe.
        ImageError: a package cannot be had or is not as expected, or the cache cannot be written.
    """
    recipe_dir = recipes / name
    if is_disk_guest(name, recipes):
        raise ImageError(
            f"guest {name} boots from a disk, and this needs one that boots from an initramfs",
            hint="use guest tiny here",
        )
    recipe = read_recipe(name, recipes, _Recipe)
    files = (recipe_dir / file for file in ("recipe.toml", *sorted(recipe.files.values())))
    image_dir = (cache or cache_dir()) / f"{name}-{build_key(_FORMAT, files)}"
    ensure_built(
        image_dir,
        lambda build_dir: _build(
            name, recipe_dir, recipe, build_dir, progress or (lambda line: None)
        ),
    )
    return _load(name, image_dir)


def verify(image: GuestImage, *, recipes: Path = RECIPES_DIR) -> Manifest:
    """Show that what is booted is what Debian's packages hold.

    The .deb files must have the SHA-256 that apt's index gave, the kernel must be the package's
    byte for byte, and the initramfs must be exactly the packages' files and modules and the
    recipe's files.

    Returns:
        The manifest; each SHA-256 in it has been computed anew.

    Raises:
        ImageError: something differs; the message says what.
    """
    image_dir = image.kernel.parent
    recipe_dir = recipes / image.name
    recipe = read_recipe(image.name, recipes, _Recipe)
    try:
        manifest = image.manifest
        content = _packaged_files(image_dir, (manifest.kernel, *manifest.modules, *manifest.files))
        packaged = {one.path: content[one] for one in manifest.files}
        modules = {one.path: content[one] for one in manifest.modules}
        if packaged.keys() != recipe.packages.keys():
            raise damaged(image_dir, "manifest.json does not have the files of the recipe")
        if {one.name for one in manifest.modules} - {manifest.kernel.name} or not is_closure(
            modules, recipe.modules
        ):
            raise damaged(image_dir, "manifest.json does not have the modules of the recipe")
        initramfs = _initramfs(packaged, modules, recipe_dir, recipe)
        _require_sha256(image.kernel, image.kernel.read_bytes(), _sha256(content[manifest.kernel]))
        _require_sha256(image.initrd, image.initrd.read_bytes(), _sha256(initramfs))
    except OSError as error:
        raise damaged(image_dir, str(error)) from error
    return manifest


def _build(
    name: str, recipe_dir: Path, recipe: _Recipe, build_dir: Path, progress: Progress
) -> None:
    meta = _resolve(recipe.kernel)
    depends = re.search(r"(linux-image-\S+) \(= (\S+)\)", meta.depends)
    if depends is None:
        raise ImageError(f"{meta.name} {meta.version} depends on no kernel: {meta.depends!r}")
    kernel_entry = _resolve(depends[1], version=depends[2])
    _fetch(kernel_entry, build_dir, progress)
    kernel, vmlinuz = _take(kernel_entry, _KERNEL_MEMBER, build_dir)
    modules = dict(_take_modules(kernel_entry, recipe.modules, build_dir))
    entries = {package: _resolve(package) for package in sorted(set(recipe.packages.values()))}
    for entry in entries.values():
        _fetch(entry, build_dir, progress)
    taken = [
        _take(entries[package], _ROOT_MEMBER + re.escape(path), build_dir)
        for path, package in sorted(recipe.packages.items())
    ]
    packaged = {package.path: data for package, data in taken}
    files = tuple(package for package, _data in taken)
    manifest = Manifest(name, host_release(), recipe.cmdline, kernel, files, tuple(modules))
    (build_dir / "vmlinuz").write_bytes(vmlinuz)
    initramfs = _initramfs(
        packaged, {module.path: data for module, data in modules.items()}, recipe_dir, recipe
    )
    (build_dir / "initrd").write_bytes(initramfs)
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (build_dir / "manifest.json").write_bytes(encoded + b"\n")


def _load(name: str, image_dir: Path) -> GuestImage:
    try:
        manifest = msgspec.json.decode((image_dir / "manifest.json").read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise damaged(image_dir, f"manifest.json: {error}") from error
    return GuestImage(name, image_dir / "vmlinuz", image_dir / "initrd", manifest.cmdline, manifest)


def _resolve(name: str, *, version: str | None = None) -> _IndexEntry:
    """Find a package in apt's index: the given version, or the release's newest.

    Backports are passed over: on Debian 12 the guest runs the kernel that Debian 12 shipped.
    """
    fields_of = [
        dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", paragraph, re.MULTILINE))
        for paragraph in run_tool("apt-cache", "show", name).split("\n\n")
    ]
    entries = [
        _IndexEntry(name, fields["Version"], fields["SHA256"], fields.get("Depends", ""))
        for fields in fields_of
        # What is only installed, and in no index, has no hash.
        if "SHA256" in fields and "~bpo" not in fields["Version"]
    ]
    if version is not None:
        entries = [entry for entry in entries if entry.version == version]
    if not entries:
        wanted = name if version is None else f"{name} {version}"
        raise ImageError(f"apt's sources have no {wanted}", hint=APT_HINT)
    return max(entries, key=functools.cmp_to_key(_compare_versions))


def _compare_versions(a: _IndexEntry, b: _IndexEntry) -> int:
    if a.version == b.version:
        return 0
    newer = subprocess.run(["dpkg", "--compare-versions", a.version, "gt", b.version], check=False)
    return 1 if newer.returncode == 0 else -1


def _fetch(entry: _IndexEntry, build_dir: Path, progress: Progress) -> None:
    """Download a package."""
    progress(f"fetch {entry.name} {entry.version}")
    # apt would warn that its own user cannot write here; it has authenticated the index anyway.
    no_sandbox = ("-o", "APT::Sandbox::User=root")
    wanted = f"{entry.name}={entry.version}"
    run_tool("apt-get", *no_sandbox, "--quiet", "download", wanted, cwd=build_dir)
    (downloaded,) = build_dir.glob(f"{entry.name}_*.deb")
    deb = downloaded.rename(build_dir / f"{entry.name}.deb")
    if _sha256(deb.read_bytes()) != entry.sha256:
        raise ImageError(f"{wanted} is not the package in apt's index", hint=APT_HINT)


def _take(entry: _IndexEntry, member: str, build_dir: Path) -> tuple[Package, bytes]:
    """Read the file out of a package that was fetched whose path matches `member`."""
    path, data = _member(build_dir / f"{entry.name}.deb", member)
    return Package(entry.name, entry.version, entry.sha256, path, _sha256(data)), data


def _take_modules(
    entry: _IndexEntry, names: Iterable[str], build_dir: Path
) -> list[tuple[Package, bytes]]:
    """Read kernel modules, and those that they depend on, out of a kernel package that was fetched.

    Each round through the package finds what the round before was found to depend on.

    Returns:
        Where each module is from, and the file; by path.
    """
    wanted = {module_name(name) for name in names}
    taken: dict[str, tuple[str, bytes]] = {}
    while missing := wanted - taken.keys():
        names_pattern = "|".join(re.escape(name).replace("_", "[-_]") for name in sorted(missing))
        member = _MODULE_MEMBER.replace("NAMES", names_pattern)
        for path, data in _members(build_dir / f"{entry.name}.deb", member, len(missing)):
            taken[module_name(path)] = (path, data)
            wanted.update(depends_on(data))
        if absent := sorted(missing - taken.keys()):
            raise ImageError(
                f"{entry.name} {entry.version} has no kernel module {', '.join(absent)}",
                hint="take it out of the recipe if it is built into this kernel",
            )
    return [
        (Package(entry.name, entry.version, entry.sha256, path, _sha256(data)), data)
        for path, data in sorted(taken.values())
    ]


def _packaged_files(image_dir: Path, packages: Collection[Package]) -> dict[Package, bytes]:
    """Read files that are booted out of their .deb files, checking both against the manifest."""
    content: dict[Package, bytes] = {}
    for deb in sorted({package.deb for package in packages}):
        path = image_dir / deb
        wanted = {package.member: package for package in packages if package.deb == deb}
        actual = _sha256(path.read_bytes())
        for package in wanted.values():
            if actual != package.sha256:
                raise damaged(image_dir, f"{deb} has SHA-256 {actual}, not {package.sha256}")
        pattern = "|".join(re.escape(member) for member in wanted)
        for member, data in _members(path, pattern, len(wanted)):
            if _sha256(data) != wanted[member].member_sha256:
                raise damaged(image_dir, f"manifest.json is wrong about {member} in {deb}")
            content[wanted[member]] = data
        if absent := wanted.keys() - {package.member for package in content}:
            raise ImageError(f"{deb} has no file {min(absent)}")
    return content


def _member(deb: Path, pattern: str) -> tuple[str, bytes]:
    """Return path and content of the first regular file in a package that matches `pattern`."""
    for found in _members(deb, pattern, 1):
        return found
    raise ImageError(f"{deb.name} has no file {pattern}")


def _members(deb: Path, pattern: str, count: int) -> Iterator[tuple[str, bytes]]:
    """Path and content of the first `count` regular files in a package that match `pattern`."""
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    # Closing the pipe early ends dpkg-deb: a kernel comes long before its 4000 modules.
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpack,
        tarfile.open(fileobj=unpack.stdout, mode="r|") as tar,
    ):
        for info in tar:
            if info.isreg() and re.fullmatch(pattern, info.name):
                content = tar.extractfile(info)
                assert content is not None
                yield info.name, content.read()
                count -= 1
                if not count:
                    return


def _initramfs(
    packaged: dict[str, bytes], modules: dict[str, bytes], recipe_dir: Path, recipe: _Recipe
) -> bytes:
    """Build the initramfs: the packages' files, busybox's name as a shell, the recipe's files."""
    own = {path: (recipe_dir / file).read_bytes() for path, file in recipe.files.items()}
    files = packaged | module_files(modules) | own
    directories = {str(parent) for path in files for parent in Path(path).parents} - {"."}
    entries = [_cpio_entry(path, stat.S_IFDIR | 0o755) for path in sorted(directories)]
    entries.append(_cpio_entry("bin/sh", stat.S_IFLNK | 0o777, b"busybox"))
    entries += [_cpio_entry(path, stat.S_IFREG | 0o755, files[path]) for path in sorted(files)]
    return b"".join((*entries, _cpio_entry("TRAILER!!!", 0)))


def _cpio_entry(path: str, mode: int, data: bytes = b"") -> bytes:
    """Return one member of a newc archive, the same bytes for the same input.

    Uncompressed, as the kernel takes it: four megabytes are not worth unpacking under TCG. Source:
    Documentation/driver-api/early-userspace/buffer-format.rst in Linux.
    """
    name = path.encode() + b"\0"
    # ino, mode, uid, gid, nlink, mtime, filesize, major, minor, rmajor, rminor, namesize, chksum
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + "".join(f"{field:08x}" for field in fields).encode()
    return _padded(header + name) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _require_sha256(path: Path, data: bytes, expected: str) -> None:
    if (actual := _sha256(data)) != expected:
        raise damaged(path.parent, f"{path.name} has SHA-256 {actual}, not {expected}")


def guest_image(name: str, progress: Progress | None = None) -> GuestImage | DiskImage:
    """Return guest `name` of either kind; otherwise as `ensure`."""
    return ensure_disk(name, progress) if is_disk_guest(name) else ensure(name, progress)


def main() -> int:
    """Build the images named on the command line, of either kind: what set-up calls."""
    try:
        for name in sys.argv[1:]:
            manifest: Manifest | DiskManifest
            if is_disk_guest(name):
                manifest = verify_disk(ensure_disk(name, progress=print))
            else:
                manifest = verify(ensure(name, progress=print))
            print(f"{name}: {manifest.kernel.name} {manifest.kernel.version}")
    except MktmeError as error:
        print(f"{error}\nhint: {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
