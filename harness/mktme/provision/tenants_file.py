# SPDX-License-Identifier: GPL-2.0-or-later
"""tenants.toml, read (docs/tenants.toml shows every key).

Reading is strict: an unknown key is an error that names the nearest one. Paths are relative to the
file. What can be wrong with a VM, or with all of them together on their platform, is found here,
before anything is started.
"""

from __future__ import annotations

import difflib
import enum
import re
import reprlib
import stat
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, TypeVar, get_args, get_type_hints

import msgspec

from mktme.attest.errors import AttestationError
from mktme.attest.identity import CA_CERTIFICATE, load_certificates, load_trust
from mktme.attest.policy import Policy
from mktme.attest.reference import Reference
from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.engine.firmware import PlatformConfig, PlatformConfigError
from mktme.engine.xts import Algorithm
from mktme.provision.errors import TenantsError
from mktme.provision.tenants import Broker, Deployment, KeySource, OnRefusal, Secret, VmSpec
from mktme.service import platform_file
from mktme.vm.config import (
    MIN_DISK_MEMORY_BYTES,
    check_data_path,
    check_sizes,
)
from mktme.vm.hardware import Firmware, Machine
from mktme.vm.host import UsageError, emulator_path
from mktme.vm.image_cache import ImageError, UnknownGuestError, is_disk_guest
from mktme.vm.pages import GuestPages, parse_pages
from mktme.vm.sizes import parse_size, parse_window

SECRET_MAX_BYTES: Final = 1 << 20

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,18}[a-z0-9])?", re.ASCII)
_NAME_HINT: Final = "1 to 20 of a-z, 0-9 and -, with no - at its ends"
_OWNER: Final = re.compile(r"[a-z_][a-z0-9_-]{0,31}(?::[a-z_][a-z0-9_-]{0,31})?", re.ASCII)
_MODE: Final = re.compile(r"0?[0-7]{3}", re.ASCII)
# As the KBS protocol names resources: GET /kbs/v0/resource/{repository}/{type}/{tag}.
_RESOURCE: Final = re.compile(r"[\w.-]{1,64}/[\w.-]{1,64}/[\w.-]{1,64}", re.ASCII)
_POLICY: Final = re.compile(r"[\w.-]{1,64}/[\w.-]{1,64}", re.ASCII)
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,40}", re.ASCII)
_WHERE: Final = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?", re.DOTALL)
_OPTION: Final = re.compile(r"--([a-z-]+) ")
_T = TypeVar("_T", bound="_Table")


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"):
    """A table of the file's."""


class _Key(_Table, frozen=True):
    source: KeySource
    resource: str | None = None
    policy: str | None = None


class _Secret(_Table, frozen=True):
    file: str
    path: str
    owner: str = "root"
    mode: str = "0600"


class _Broker(_Table, frozen=True):
    url: str
    trust: str


class _Vm(_Table, frozen=True):
    guest: str | None = None
    image: str | None = None
    memory: str | int = "512M"
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=255)] = 1
    machine: Machine = Machine.Q35
    firmware: Firmware = Firmware.BIOS
    datapath: DataPath = DataPath.SHADOW
    track: Track | None = None
    window: str | int | None = None
    algorithm: Algorithm = Algorithm.AES_XTS_128
    key: Any = None
    pages: tuple[str, ...] = ()
    policy: str | None = None
    reference: str | None = None
    secrets: Any = ()
    boot_timeout: Annotated[float, msgspec.Meta(ge=1, le=86_400)] | None = None


class _Tenant(_Table, frozen=True):
    policy: str | None = None
    reference: str | None = None
    vms: Any = None


class _File(_Table, frozen=True):
    name: str
    platform: str | None = None
    emulator: str | None = None
    ca: str | None = None
    trust: tuple[str, ...] = ()
    on_refusal: OnRefusal = OnRefusal.REMOVE
    broker: Any = None
    tenants: Any = None


def read_tenants(path: Path) -> Deployment:
    """Read what is wanted from its file.

    Args:
        path: the file, TOML 1.0.

    Raises:
        TenantsError: with the file, the line where it is certain, the key, what is wrong with it,
            and what is allowed.
    """
    try:
        text = platform_file.read_text(path)
        table = tomllib.loads(text)
    except PlatformConfigError as error:
        raise TenantsError("", str(error), hint=error.hint) from error
    # ValueError: Python limits how many digits a number may have.
    except (ValueError, RecursionError) as error:
        raise TenantsError("", f"{path}: not TOML: {error}") from error
    try:
        return deployment(table, path.absolute().parent)
    except TenantsError as error:
        line = platform_file.line_of(error.key, text) if error.key else None
        place = path if line is None else f"{path}:{line}"
        error.args = (f"{place}: {error}",)
        raise


def deployment(table: Mapping[str, Any], directory: Path) -> Deployment:
    """What a file's contents want.

    Args:
        table: the file, as tomllib has it.
        directory: where the file is: absolute.

    Raises:
        TenantsError: with the key, what is wrong with it, and what is allowed.
    """
    file = _table(dict(table), _File, "")
    _check_name("name", file.name)
    platform = PlatformConfig()
    if file.platform is not None:
        with _Blaming("platform"):
            platform = platform_file.read_platform(directory / file.platform)
    emulator = None
    if file.emulator is not None:
        with _Blaming("emulator"):
            emulator = emulator_path(_emulator(file.emulator, directory))
    ca = None if file.ca is None else directory / file.ca
    if ca is not None:
        with _Blaming("ca"):
            load_trust([ca / CA_CERTIFICATE])
    trust = tuple(directory / one for one in file.trust)
    with _Blaming("trust"):
        load_trust(trust)
    result = Deployment(
        name=file.name,
        platform=platform,
        emulator=emulator,
        ca=ca,
        trust=trust,
        on_refusal=file.on_refusal,
        broker=_broker(file.broker, directory),
        vms=tuple(sorted(_vms(file, directory), key=lambda one: one.name)),
    )
    for one in result.vms:
        if one.source is KeySource.BROKER and result.broker is None:
            raise TenantsError(
                f"tenants.{one.tenant}.vms.{one.vm}.key",
                "there is no broker to have it from",
                hint='[broker] with url = "https://..."',
            )
    result.check()
    return result


def _emulator(text: str, directory: Path) -> str:
    return str(directory / text) if "/" in text else text


def _broker(value: object, directory: Path) -> Broker | None:
    if value is None:
        return None
    broker = _table(value, _Broker, "broker")
    if not broker.url.startswith("https://"):
        raise TenantsError("broker.url", "not an https URL", hint='"https://host:port"')
    trust = directory / broker.trust
    with _Blaming("broker.trust"):
        load_certificates([trust])
    return Broker(broker.url.rstrip("/"), trust)


def _vms(file: _File, directory: Path) -> Iterator[VmSpec]:
    for tenant_name, value in _named(file.tenants, "tenants"):
        key = f"tenants.{tenant_name}"
        tenant = _table(value, _Tenant, key)
        for vm_name, one in _named(tenant.vms, f"{key}.vms"):
            yield _vm(one, tenant, (tenant_name, vm_name), directory)


def _vm(value: object, tenant: _Tenant, names: tuple[str, str], directory: Path) -> VmSpec:
    key = f"tenants.{names[0]}.vms.{names[1]}"
    vm = _table(value, _Vm, key)
    if (vm.guest is None) == (vm.image is None):
        raise TenantsError(key, "wants one of guest and image", hint='guest = "tiny"')
    if vm.guest is not None:
        with _Blaming(f"{key}.guest"):
            is_disk_guest(vm.guest)
    image = None if vm.image is None else directory / vm.image
    if image is not None and not image.is_file():
        raise TenantsError(f"{key}.image", f"{image} is no file", hint="a qcow2 or raw disk image")
    with _Blaming(f"{key}.memory"):
        memory_bytes = parse_size(str(vm.memory))
    window_bytes = None
    if vm.window is not None:
        with _Blaming(f"{key}.window"):
            window_bytes = parse_window(str(vm.window), memory_bytes)
    elif vm.datapath is DataPath.INLINE:
        window_bytes = parse_window("25%", memory_bytes)
    track = vm.track
    if track is None and vm.datapath is DataPath.SHADOW:
        track = Track.STORES_AND_PAGES
    released = _key(vm.key, f"{key}.key")
    spec = VmSpec(
        tenant=names[0],
        vm=names[1],
        guest=vm.guest,
        image=image,
        memory_bytes=memory_bytes,
        vcpus=vm.vcpus,
        machine=vm.machine,
        firmware=vm.firmware,
        datapath=vm.datapath,
        track=track,
        window_bytes=window_bytes,
        algorithm=vm.algorithm,
        source=released.source,
        resource=released.resource,
        broker_policy=released.policy,
        pages=_pages(vm.pages, f"{key}.pages"),
        policy=_appraised_by("policy", vm.policy or tenant.policy, key, directory, Policy.load),
        reference=_appraised_by(
            "reference", vm.reference or tenant.reference, key, directory, Reference.load
        ),
        secrets=tuple(_secrets(vm.secrets, f"{key}.secrets", directory)),
        boot_timeout_s=vm.boot_timeout,
    )
    _check(spec, key)
    return spec


def _check(spec: VmSpec, key: str) -> None:
    """As `mktme.vm.config.check_config`, before there is an image."""
    with _Blaming(key):
        check_sizes(spec.memory_bytes, spec.vcpus)
        check_data_path(spec.datapath, spec.track, spec.window_bytes, spec.memory_bytes)
    with _Blaming(f"{key}.pages"):
        for one in spec.pages:
            one.ram_offset(spec.memory_bytes, spec.machine)
    if spec.has_ssh:
        if spec.memory_bytes < MIN_DISK_MEMORY_BYTES:
            raise TenantsError(
                f"{key}.memory",
                f"{spec.memory_bytes >> 20} MiB are too little for a guest that boots its disk",
                hint=f'"{MIN_DISK_MEMORY_BYTES >> 20}M" or more',
            )
        return
    disk_guest = 'guest = "debian-12", or image = "FILE"'
    if spec.firmware is not Firmware.BIOS:
        raise TenantsError(
            f"{key}.firmware", f"guest {spec.guest} boots without firmware", hint=disk_guest
        )
    if spec.secrets:
        raise TenantsError(
            f"{key}.secrets", f"guest {spec.guest} has no ssh to hand them over", hint=disk_guest
        )


def _key(value: object, key: str) -> _Key:
    if value is None:
        return _Key(source=KeySource.RANDOM)
    one = _table(value, _Key, key)
    hint = '{ source = "broker", resource = "repository/type/tag" }, or { source = "random" }'
    if (one.source is KeySource.BROKER) != (one.resource is not None):
        raise TenantsError(key, "source broker and a resource go together", hint=hint)
    if one.resource is not None and not _RESOURCE.fullmatch(one.resource):
        raise TenantsError(f"{key}.resource", "not a resource's path", hint=hint)
    if one.policy is not None and (one.resource is None or not _POLICY.fullmatch(one.policy)):
        raise TenantsError(
            f"{key}.policy", "not one of the broker's policies", hint='"tenant/policy"'
        )
    return one


def _pages(values: Collection[str], key: str) -> tuple[GuestPages, ...]:
    with _Blaming(key):
        pages = sorted(map(parse_pages, values), key=lambda one: one.guest_physical)
    for one, following in pairwise(pages):
        if one.guest_physical + one.size_bytes > following.guest_physical:
            raise TenantsError(key, f"{one} and {following} overlap")
    return tuple(pages)


def _appraised_by(
    what: str, value: str | None, key: str, directory: Path, load: Callable[[Path], object]
) -> Path:
    if value is None:
        raise TenantsError(
            key, f"has no {what}, and neither has its tenant", hint=f'{what} = "FILE"'
        )
    path = directory / value
    with _Blaming(f"{key}.{what}"):
        load(path)
    return path


def _secrets(values: object, key: str, directory: Path) -> Iterator[Secret]:
    if not isinstance(values, list | tuple):
        raise TenantsError(
            key, "is not an array of tables", hint='[{ file = "...", path = "..." }]'
        )
    paths: set[str] = set()
    for value in values:
        one = _table(value, _Secret, key)
        file = directory / one.file
        with _Blaming(f"{key}.file"):
            check_secret_file(file)
        path = PurePosixPath(one.path)
        if not path.is_absolute() or ".." in path.parts or not one.path.isprintable():
            raise TenantsError(f"{key}.path", "not an absolute path", hint='"/run/app/token"')
        if str(path) in paths:
            raise TenantsError(f"{key}.path", f"{path} is there twice")
        paths.add(str(path))
        if not _OWNER.fullmatch(one.owner):
            raise TenantsError(f"{key}.owner", "not an owner", hint='"user" or "user:group"')
        if not _MODE.fullmatch(one.mode):
            raise TenantsError(
                f"{key}.mode", "not a file's mode", hint='"0600", "0400" or the like'
            )
        yield Secret(file, str(path), one.owner, int(one.mode, 8))


def check_secret_file(file: Path) -> None:
    """Check that a secret can be read here, by its owner alone.

    Raises:
        UsageError: it cannot.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{file} is no file")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"{file} is open to others", hint=f"chmod 600 {file}")
    if not 0 < status.st_size <= SECRET_MAX_BYTES:
        raise UsageError(
            f"{file} has {status.st_size} bytes", hint=f"allowed: 1 to {SECRET_MAX_BYTES}"
        )


class _Blaming:
    """Errors within the `with` are a key's; options of commands in their hints become keys."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(
            error,
            UsageError | PlatformConfigError | AttestationError | UnknownGuestError | ImageError,
        ) and not isinstance(error, TenantsError):
            hint = None if error.hint is None else _OPTION.sub(r"\1 = ", error.hint)
            raise TenantsError(self._key, str(error), hint=hint) from error


def _named(value: object, key: str) -> Iterator[tuple[str, object]]:
    """The members of a table of tables, whose names are the user's."""
    hint = f"[{key}.NAME]"
    if value is None:
        raise TenantsError(key, "there are none", hint=hint)
    if not isinstance(value, dict):
        raise TenantsError(key, "is not a table", hint=hint)
    for name, one in value.items():
        _check_name(f"{key}.{name}" if _BARE_KEY.fullmatch(name) else key, name)
        yield name, one


def _check_name(key: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise TenantsError(key, f"{reprlib.repr(name)} is no name", hint=_NAME_HINT)


def _table(value: object, kind: type[_T], key: str) -> _T:
    """A table of known keys."""
    prefix = f"{key}." if key else ""
    known = {one.encode_name: one.name for one in msgspec.structs.fields(kind)}
    if not isinstance(value, dict):
        raise TenantsError(key, "is not a table", hint=f"its keys: {', '.join(known)}")
    for name in value:
        if name not in known:
            nearest = difflib.get_close_matches(name[:40].lower(), known, 1)
            guess = f"did you mean {nearest[0]}? " if nearest else ""
            raise TenantsError(
                f"{prefix}{name}" if _BARE_KEY.fullmatch(name) else prefix + reprlib.repr(name),
                "unknown key",
                hint=f"{guess}allowed: {', '.join(known)}",
            )
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        found = _WHERE.fullmatch(str(error))
        assert found is not None
        name = re.split(r"[.\[]", found["path"] or "")[0]
        hint = _allowed(kind, known[name]) if name in known else None
        raise TenantsError(
            f"{prefix}{name}".rstrip("."), _plain(found["what"]), hint=hint
        ) from error


def _plain(message: str) -> str:
    """What msgspec says, as this file's other errors say it."""
    return re.sub(r"^Object missing required field `(.*)`$", r"has no \1", message).replace("`", "")


def _allowed(kind: type, field: str) -> str | None:
    """What a setting may be, if it is one of several words."""
    hint = get_type_hints(kind)[field]
    for one in (hint, *get_args(hint)):
        if isinstance(one, type) and issubclass(one, enum.Enum):
            return f"allowed: {', '.join(str(each.value) for each in one)}"
    return None
