# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that boot from a disk: Debian as its installer would leave it, and a user's own images.

A recipe (``guest-images/NAME/recipe.toml`` with a ``suite``) names packages of a Debian suite. They
come from the mirror in the machine's own apt sources, apt authenticates them, and mmdebstrap
installs them; what is ours is what an installer would write, and the manifest lists it. At the end
of a build each packaged file in the image is compared with its package's MD5, and the list is kept
for the guest to do the same. No loop device, no mount outside a namespace of the build's own.

A base image is never written to: a guest runs on an `overlay`, and cloud-init in it finds what
makes it this guest (its name, a user, a key) on a second disk, the seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

import msgspec

from mktme.vm.apt_sources import acquire_options, sources_for
from mktme.vm.disk_layout import (
    ROOT_OFFSET_BYTES,
    SECTOR_BYTES,
    grub_config,
    is_bootable,
    make_bootable,
    make_fat,
)
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
    is_disk_guest,
    read_recipe,
    run_tool,
    tool_environment,
    tool_missing,
)

__all__ = [
    "DebPackage",
    "DiskImage",
    "DiskManifest",
    "ImageError",
    "UnknownGuestError",
    "ensure_disk",
    "make_seed",
    "overlay",
    "packaged_files",
    "user_image",
    "verify_disk",
]

_FORMAT = 2
"""Part of every image's key: raise it when this module builds something else from a recipe."""

_BUILD_ROOT = RECIPES_DIR / "build-root"

_CLOUD_CONFIG = """\
# The seed is a disk labelled CIDATA; looking for other clouds would only take time.
datasource_list: [NoCloud]
"""

_SEED_KIB = 512


@dataclass(frozen=True, slots=True)
class DebPackage:
    """A Debian package that is installed in an image.

    Attributes:
        sha256: of the .deb, as apt's authenticated index had it.
    """

    name: str
    version: str
    architecture: str
    sha256: str


@dataclass(frozen=True, slots=True)
class DiskManifest:
    """What a disk was built from; ``manifest.json`` beside it.

    Attributes:
        kernel: the package that has the kernel.
        disk_sha256: of the raw disk.
        md5sums_sha256: of the list that `packaged_files` returns.
        files_ours: paths in the guest that no package has or that an installer would change.
    """

    guest: str
    suite: str
    cmdline: str
    kernel: DebPackage
    packages: tuple[DebPackage, ...]
    disk_sha256: str
    md5sums_sha256: str
    files_ours: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DiskImage:
    """A disk that a guest can boot from.

    Attributes:
        name: the recipe's, or a user's file's.
        disk: the base, which is never written to.
        format: "raw" or "qcow2".
        manifest: None if it is a user's own image.
    """

    name: str
    disk: Path
    format: str
    manifest: DiskManifest | None


@dataclass(frozen=True, slots=True)
class _Recipe:
    """``recipe.toml``.

    Attributes:
        suite: codename of the Debian release.
        kernel: a metapackage that depends on the kernel's.
        packages: what to install beside it and the essential and required packages.
        disk_mib: size of the disk, in MiB.
    """

    suite: str
    kernel: str
    cmdline: str
    packages: tuple[str, ...]
    disk_mib: int


def ensure_disk(
    name: str,
    progress: Progress | None = None,
    *,
    recipes: Path = RECIPES_DIR,
    cache: Path | None = None,
) -> DiskImage:
    """Return disk guest `name`, building its image if the cache has none for its recipe.

    An image is keyed by its recipe and the Debian release that builds it, not by package versions:
    once built it is found without apt or network.

    Args:
        name: the recipe's name.
        progress: called with one line for each step of a build, not at all for a cached image.
        recipes: directory of recipes.
        cache: directory of images; default is `cache_dir()`.

    Raises:
        UnknownGuestError: there is no such recipe.
        ImageError: it is not one of a disk guest, a package cannot be had, a tool is missing or
            fails, or the cache cannot be written.
    """
    if not is_disk_guest(name, recipes):
        raise ImageError(
            f"guest {name} boots from an initramfs, and this needs one that boots from a disk",
            hint="use guest debian-12 here, or a disk image of your own",
        )
    recipe = read_recipe(name, recipes, _Recipe)
    key = build_key(_FORMAT, (recipes / name / "recipe.toml", _BUILD_ROOT))
    image_dir = (cache or cache_dir()) / f"{name}-{key}"
    ensure_built(
        image_dir,
        lambda build_dir: _build(name, recipe, key, build_dir, progress or (lambda line: None)),
    )
    return DiskImage(name, image_dir / "disk", "raw", _load(image_dir))


def user_image(path: Path) -> DiskImage:
    """A user's own disk image, looked at before a guest is started from it.

    Raises:
        ImageError: it cannot be read, is neither raw nor qcow2, needs other files, or has nothing
            that firmware could boot.
    """
    if not path.exists():
        raise ImageError(f"{path}: there is no such file", hint="name a qcow2 or raw disk image")
    if not path.is_file():
        raise ImageError(f"{path} is not a file", hint="name a qcow2 or raw disk image")
    if not os.access(path, os.R_OK):
        raise ImageError(f"{path} cannot be read", hint=f"chmod a+r {path}")
    path = path.resolve()
    # Forced to share: a guest that runs from an overlay on it has it locked.
    info = json.loads(run_tool("qemu-img", "info", "--force-share", "--output=json", str(path)))
    image_format = info["format"]
    if image_format not in ("raw", "qcow2"):
        raise ImageError(
            f"{path} is a {image_format} image, and neither raw nor qcow2",
            hint=f"qemu-img convert -O qcow2 {path} {path.with_suffix('.qcow2')}",
        )
    if image_format == "raw" and path.suffix == ".qcow2":
        raise ImageError(f"{path} is no qcow2 image", hint="it may be damaged: copy it anew")
    specific = info.get("format-specific", {}).get("data", {})
    other = info.get("backing-filename") or specific.get("data-file")
    if other is not None:
        raise ImageError(
            f"{path} is not whole: it needs {other}",
            hint=f"qemu-img convert -O qcow2 {path} whole.qcow2, and use whole.qcow2",
        )
    if not is_bootable(_first_sectors(path, image_format)):
        raise ImageError(
            f"{path} cannot be booted: it has no partition table",
            hint="name the image of a whole disk, not of a partition or file system",
        )
    return DiskImage(path.name, path, image_format, None)


def overlay(image: DiskImage, path: Path) -> Path:
    """Make the disk that a guest may write to: a new qcow2 file on top of the base.

    Returns:
        `path`.

    Raises:
        ImageError: it is there already, or cannot be made.
    """
    if path.exists():
        raise ImageError(f"{path} is there already", hint="remove it, or name another file")
    base = ("-b", str(image.disk.resolve()), "-F", image.format)
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", *base, str(path))
    return path


def packaged_files(image: DiskImage) -> Path:
    """The MD5 of every packaged file, for ``md5sum --check`` in the guest.

    Raises:
        ImageError: it is a user's own image, whose packages are not known.
    """
    _manifest(image)
    return image.disk.parent / "md5sums"


def verify_disk(image: DiskImage) -> DiskManifest:
    """Show that the base is as it was built, and so is the list of its packaged files.

    Returns:
        The manifest; the SHA-256 of both have been computed anew.

    Raises:
        ImageError: one of them differs, or it is a user's own image.
    """
    manifest = _manifest(image)
    expected = (
        (image.disk, manifest.disk_sha256),
        (packaged_files(image), manifest.md5sums_sha256),
    )
    for path, sha256 in expected:
        try:
            actual = _sha256(path)
        except OSError as error:
            raise damaged(path.parent, str(error)) from error
        if actual != sha256:
            raise damaged(path.parent, f"{path.name} has SHA-256 {actual}, not {sha256}")
    return manifest


def make_seed(
    path: Path, *, hostname: str, user: str, public_keys: Sequence[str], password: str | None = None
) -> None:
    """Make a NoCloud seed: a small disk that tells cloud-init the guest's name and who may log in.

    The user can do all by sudo, and logs in with the key only. Host keys are made in the guest, and
    printed on its console. Every network interface asks for an address by DHCP, and none is waited
    for. Nothing is updated. Each seed is a new instance to cloud-init.

    Args:
        path: the disk, which must not be there.
        hostname: the guest's.
        user: made in the guest if it has none of that name.
        public_keys: as in authorized_keys, one line each.
        password: of the user, for the console; None for none. Over ssh it does not count.

    Raises:
        ValueError: a name or the key is malformed.
        ImageError: the seed cannot be made.
    """
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", hostname):
        raise ValueError(f"no host name: {hostname!r}")
    if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", user):
        raise ValueError(f"no user name: {user!r}")
    for key in public_keys:
        if not re.fullmatch(r"[a-z0-9@.-]+ [A-Za-z0-9+/=]+( [^\n]*)?\n?", key):
            raise ValueError("a public key is one line, as in authorized_keys")
    meta_data = {"instance-id": str(uuid4()), "local-hostname": hostname}
    user_data = {
        "users": [
            {
                "name": user,
                "shell": "/bin/bash",
                "lock_passwd": password is None,
                "sudo": "ALL=(ALL) NOPASSWD:ALL",
                "ssh_authorized_keys": [key.strip() for key in public_keys],
                **({} if password is None else {"plain_text_passwd": password}),
            }
        ],
        "ssh_pwauth": False,
        # One is enough, and an RSA key takes seconds under TCG.
        "ssh_genkeytypes": ["ed25519"],
        "ssh": {"emit_keys_to_console": True},
        "manage_etc_hosts": "localhost",
        # Else it would generate en_US.UTF-8, which takes long and fails in Debian 12.
        "locale": False,
        "package_update": False,
        "package_upgrade": False,
    }
    interface = {"match": {"name": "e*"}, "dhcp4": True, "dhcp6": False}
    # Named as matched: Debian 12's cloud-init tells systemd-networkd the name, and not the match.
    network_config = {"version": 2, "ethernets": {"e*": interface}}
    # JSON is YAML.
    files = {
        "meta-data": json.dumps(meta_data),
        "user-data": f"#cloud-config\n{json.dumps(user_data, indent=1)}",
        "network-config": json.dumps(network_config),
    }
    if path.exists():
        raise ImageError(f"{path} is there already", hint="remove it, or name another file")
    make_fat(
        path, "CIDATA", _SEED_KIB, {name: f"{text}\n".encode() for name, text in files.items()}
    )


def _build(name: str, recipe: _Recipe, key: str, build_dir: Path, progress: Progress) -> None:
    root = uuid5(NAMESPACE_URL, f"mktme:{name}-{key}")
    disk_bytes = recipe.disk_mib << 20
    ours = _our_files(name, recipe, root)
    with tempfile.TemporaryDirectory(dir=build_dir) as directory:
        work = Path(directory)
        for path, text in ours.items():
            (work / "ours" / path).parent.mkdir(parents=True, exist_ok=True)
            (work / "ours" / path).write_text(text)
        sources = sources_for(recipe.suite)
        for file, text in (("mirror.sources", sources.deb822), ("mirror.list", sources.one_line)):
            if text:
                (work / file).write_text(f"{text}\n")
        (work / "apt.conf").write_text(acquire_options())
        disk = work / "disk"
        disk.touch()
        os.truncate(disk, disk_bytes)
        packages = ",".join((recipe.kernel, *recipe.packages))
        size_kib = (disk_bytes - ROOT_OFFSET_BYTES) >> 10
        arguments = (recipe.suite, packages, str(root), str(ROOT_OFFSET_BYTES), str(size_kib))
        _run_build_root(arguments, work, progress)
        progress("GRUB for BIOS and UEFI")
        make_bootable(disk, root, work)
        installed = _installed((work / "packages").read_text(), (work / "index").read_text())
        (kernel,) = (
            package for package in installed if re.fullmatch(r"linux-image-\d.*", package.name)
        )
        disk.rename(build_dir / "disk")
        (work / "md5sums").rename(build_dir / "md5sums")
    manifest = DiskManifest(
        name,
        recipe.suite,
        recipe.cmdline,
        kernel,
        installed,
        _sha256(build_dir / "disk"),
        _sha256(build_dir / "md5sums"),
        tuple(f"/{path}" for path in sorted(ours)),
    )
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (build_dir / "manifest.json").write_bytes(encoded + b"\n")


def _our_files(name: str, recipe: _Recipe, root: UUID) -> dict[str, str]:
    """What an installer would write, by path in the guest."""
    return {
        "boot/grub/grub.cfg": grub_config(recipe.cmdline, root),
        "etc/cloud/cloud.cfg.d/90_mktme.cfg": _CLOUD_CONFIG,
        "etc/fstab": f"UUID={root} / ext4 errors=remount-ro 0 1\n",
        "etc/hostname": f"{name}\n",
        "etc/hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
    }


def _run_build_root(arguments: tuple[str, ...], work: Path, progress: Progress) -> None:
    """Run ``build-root`` where nothing of it can outlive it, or this process.

    The kernel kills setpriv's child when this process dies, that kills the first process of a PID
    namespace, and with the namespace go all its processes and mounts.
    """
    user_namespace = () if os.geteuid() == 0 else ("--map-root-user", "--map-auto")
    command = (
        *("setpriv", "--pdeathsig", "KILL"),
        *("unshare", *user_namespace, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
        *(str(_BUILD_ROOT), *arguments),
    )
    last = "no message"
    try:
        process = subprocess.Popen(
            command,
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=tool_environment(),
        )
    except FileNotFoundError as error:
        raise tool_missing(command[0]) from error
    with process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                last = line.strip() or last
                # mmdebstrap's steps, but not the text of our hook.
                if line.startswith("I: ") and "hook" not in line:
                    progress(last.removeprefix("I: "))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        hint = APT_HINT
        if user_namespace:
            hint = f"needs uidmap and a range in /etc/subuid, unless you are root; or {hint}"
        raise ImageError(f"{_BUILD_ROOT.name}: {last}", hint=hint)


def _installed(listed: str, index: str) -> tuple[DebPackage, ...]:
    """Join dpkg's list of what is installed with the hashes in apt's index.

    Raises:
        ImageError: a package is not in apt's index.
    """
    sha256 = {}
    for paragraph in index.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", paragraph, re.MULTILINE))
        # What dpkg knows of a package comes as well, and has no hash.
        if "SHA256" in fields:
            key = fields["Package"], fields["Version"], fields["Architecture"]
            sha256[key] = fields["SHA256"]
    packages = []
    for line in listed.splitlines():
        name, version, architecture = line.split()
        # dpkg qualifies the name of a package that may be installed for several architectures.
        name = name.partition(":")[0]
        if (name, version, architecture) not in sha256:
            raise ImageError(f"apt's index has no {name} {version}", hint=APT_HINT)
        digest = sha256[name, version, architecture]
        packages.append(DebPackage(name, version, architecture, digest))
    return tuple(sorted(packages, key=lambda package: package.name))


def _load(image_dir: Path) -> DiskManifest:
    try:
        encoded = (image_dir / "manifest.json").read_bytes()
        return msgspec.json.decode(encoded, type=DiskManifest)
    except (OSError, msgspec.DecodeError) as error:
        raise damaged(image_dir, f"manifest.json: {error}") from error


def _manifest(image: DiskImage) -> DiskManifest:
    if image.manifest is None:
        raise ImageError(
            f"{image.name} is your own image: what it should hold is not known",
            hint="use guest debian-12 or debian-13 here",
        )
    return image.manifest


def _first_sectors(path: Path, image_format: str) -> bytes:
    """The first two sectors of the disk that an image holds."""
    with tempfile.TemporaryDirectory() as directory:
        head = Path(directory) / "head"
        blocks = (f"bs={SECTOR_BYTES}", "count=2", f"if={path}", f"of={head}")
        run_tool("qemu-img", "dd", "-U", "-f", image_format, "-O", "raw", *blocks)
        return head.read_bytes()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
