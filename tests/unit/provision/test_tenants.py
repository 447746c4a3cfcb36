# SPDX-License-Identifier: GPL-2.0-or-later
"""tenants.toml: what it may say, and what is said to who wrote it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from msgspec.structs import fields

from mktme.attest.identity import CertificateAuthority
from mktme.datapath.kinds import DataPath
from mktme.datapath.shadow import Track
from mktme.engine.xts import Algorithm
from mktme.provision.errors import TenantsError
from mktme.provision.tenants import KeySource, OnRefusal, Secret
from mktme.provision.tenants_file import (
    _Broker,
    _File,
    _Key,
    _Secret,
    _Tenant,
    _Vm,
    read_tenants,
)
from mktme.vm.hardware import Firmware, Machine
from mktme.vm.pages import GuestPages, PageUse

from .bench import write_files

EXAMPLE = Path(__file__).parents[3] / "docs" / "tenants.toml"
MIB = 1 << 20
FILE = """\
name = "bench"

[tenants.alice]
policy = "policy.toml"
reference = "reference.json"

[tenants.alice.vms.web]
guest = "tiny"
memory = "256M"

[tenants.alice.vms.db]
guest = "{guest}"
"""


@pytest.fixture
def tenants(files: Path) -> Path:
    return files / "tenants.toml"


def test_defaults(tenants: Path) -> None:
    tenants.write_text(FILE.format(guest="debian-12"))
    found = read_tenants(tenants)
    assert (found.name, found.on_refusal, found.broker, found.ca) == (
        "bench",
        OnRefusal.REMOVE,
        None,
        None,
    )
    db, web = found.vms
    assert (web.name, web.memory_bytes, web.vcpus) == ("alice.web", 256 * MIB, 1)
    assert (web.datapath, web.track, web.window_bytes) == (
        DataPath.SHADOW,
        Track.STORES_AND_PAGES,
        None,
    )
    assert (web.source, web.resource, web.secrets) == (KeySource.RANDOM, None, ())
    assert web.policy == tenants.parent / "policy.toml"
    assert (db.guest, db.has_ssh, web.has_ssh) == ("debian-12", True, False)


def test_example_has_every_key(tmp_path: Path) -> None:
    """The example is read as it is, but for its comments; and with them it names every key."""
    text = EXAMPLE.read_text()
    for table in (_File, _Tenant, _Vm, _Key, _Secret, _Broker):
        for field in fields(table):
            assert re.search(
                rf"(^|[#{{,.\s\[]){re.escape(field.encode_name)}(\s*=|[.\]])", text, re.M
            ), field.encode_name
    prepare(tmp_path)
    (tmp_path / "tenants.toml").write_text(re.sub(r"^#(?! )", "", text, flags=re.M))
    found = read_tenants(tmp_path / "tenants.toml")
    web, db, own = (found.vms[index] for index in (1, 2, 0))
    assert [one.name for one in (web, db, own)] == ["alice.web", "bob.db", "alice.own"]
    assert web.secrets == (Secret(tmp_path / "secrets/token", "/run/app/token", "root", 0o600),)
    assert (db.source, db.resource, db.broker_policy) == (
        KeySource.BROKER,
        "bob/key/db",
        "bob/strict",
    )
    assert (db.datapath, db.window_bytes, db.algorithm) == (
        DataPath.INLINE,
        64 * MIB,
        Algorithm.AES_XTS_128_INTEGRITY,
    )
    assert db.pages == (GuestPages(64 * MIB, 16 * MIB, PageUse.SHARED),)
    assert (own.machine, own.firmware) == (Machine.PC, Firmware.UEFI)
    shutil.copy(EXAMPLE, tmp_path / "tenants.toml")
    assert {one.name for one in read_tenants(tmp_path / "tenants.toml").vms} <= {
        one.name for one in found.vms
    }


def prepare(directory: Path) -> None:
    """The files that the example names."""
    write_files(directory)
    CertificateAuthority.make("test").save(directory / "ca")
    for name in ("policies", "references", "secrets"):
        (directory / name).mkdir()
    for name in ("alice", "strict"):
        shutil.copy(directory / "policy.toml", directory / "policies" / f"{name}.toml")
    for name in ("debian-12", "tiny", "cloud"):
        shutil.copy(directory / "reference.json", directory / "references" / f"{name}.json")
    shutil.copy(directory / "token", directory / "secrets" / "token")
    for name in ("root.pem", "broker.pem"):
        shutil.copy(directory / "ca" / "ca.pem", directory / name)
    (directory / "platform.toml").write_text('dram = "8G"\n')
    (directory / "cloud.qcow2").write_bytes(b"QFI")


ERRORS = {
    "unknown key": (
        'memry = "1G"',
        r":13: tenants\.alice\.vms\.db\.memry: unknown key",
        r"did you mean memory\? allowed: guest, image, memory, ",
    ),
    "unknown key of a key": (
        'key = { sorce = "random" }',
        r":13: tenants\.alice\.vms\.db\.key\.sorce: unknown key",
        r"did you mean source\? allowed: source, resource, policy",
    ),
    "too little memory": (
        'memory = "100M"',
        r"db: 100 MiB are too little",
        "memory = 192M or more",
    ),
    "no size": ('memory = "much"', r":13: .*\.db\.memory: 'much' is not a size", "512M"),
    "too many vCPUs": ("vcpus = 256", r":13: .*\.vcpus: Expected int <= 255", None),
    "text for a number": ('vcpus = "2"', r":13: .*\.vcpus: Expected int, got str", None),
    "no data path": ('datapath = "inlne"', r":13: .*\.datapath: Invalid", "shadow, inline"),
    "window of shadow": ('window = "25%"', r"the shadow data path has no window", "datapath = "),
    "tracker of inline": (
        'datapath = "inline"\ntrack = "pages"',
        r"the inline data path needs no page tracker",
        "track = stores",
    ),
    "firmware for none": ('firmware = "uefi"', r":13: .*tiny boots without firmware", "debian-12"),
    "secret for none": (
        'secrets = [{ file = "token", path = "/run/x" }]',
        r":13: .*\.secrets: guest tiny has no ssh",
        "debian-12",
    ),
    "no broker": (
        'key = { source = "broker", resource = "a/b/c" }',
        r":13: .*\.key: there is no broker",
        r"\[broker\]",
    ),
    "broker without resource": (
        'key = { source = "broker" }',
        r":13: .*\.key: source broker and a resource go together",
        "resource",
    ),
    "resource that climbs": (
        'key = { source = "broker", resource = "../../etc/passwd" }',
        r":13: .*\.key\.resource: not a resource's path",
        "repository/type/tag",
    ),
    "pages that overlap": (
        'pages = ["16M@64M=shared", "16M@72M=no-encrypt"]',
        r":13: .*\.pages: 16M@64M=shared and 16M@72M=no-encrypt overlap",
        None,
    ),
    "pages that are no RAM": ('pages = ["16M@64G=shared"]', r":13: .*not all RAM", "RAM is 0 to"),
    "policy that is not there": ('policy = "none.toml"', r":13: .*\.policy: .*none\.toml", None),
    "policy that is none": ('policy = "token"', r":13: .*\.policy: not a TOML file", None),
    "reference that is none": ('reference = "policy.toml"', r":13: .*no reference values", None),
    "both": ('image = "token"', r"db: wants one of guest and image", "guest = "),
    "no such name": ('[tenants.Alice.vms.web]\nguest = "tiny"', r"'Alice' is no name", "a-z"),
    "no tenants": ("[tenants.bob]", r":13: tenants\.bob\.vms: there are none", r"NAME"),
    "unknown table": ('[brokr]\nurl = "x"', r":13: brokr: unknown key", r"did you mean broker\?"),
    "broker over HTTP": (
        '[broker]\nurl = "http://x"\ntrust = "token"',
        r":14: broker\.url: not an https URL",
        "https",
    ),
    "no CA": (
        '[broker]\nurl = "https://x"\ntrust = "token"',
        r":15: broker\.trust: .*no PEM file",
        None,
    ),
}


@pytest.mark.parametrize(("line", "message", "hint"), ERRORS.values(), ids=ERRORS)
def test_errors_name_line_key_and_what_is_allowed(
    tenants: Path, line: str, message: str, hint: str | None
) -> None:
    tenants.write_text(FILE.format(guest="tiny") + line + "\n")
    with pytest.raises(TenantsError, match=message) as caught:
        read_tenants(tenants)
    assert str(caught.value).startswith(str(tenants))
    if hint is not None:
        assert re.search(hint, str(caught.value.hint)), caught.value.hint


SECRETS = {
    "open to others": ('{ file = "policy.toml", path = "/run/x" }', "is open to others"),
    "not there": ('{ file = "none", path = "/run/x" }', "No such file"),
    "no file": ('{ file = ".", path = "/run/x" }', "is no file"),
    "relative": ('{ file = "token", path = "run/x" }', "not an absolute path"),
    "climbs": ('{ file = "token", path = "/run/../etc/shadow" }', "not an absolute path"),
    "owner with a command": (
        '{ file = "token", path = "/run/x", owner = "root; reboot" }',
        "not an owner",
    ),
    "mode in decimal": ('{ file = "token", path = "/run/x", mode = "0690" }', "not a file's mode"),
    "twice": (
        '{ file = "token", path = "/run/x" }, { file = "token", path = "/run//x" }',
        "is there twice",
    ),
}


@pytest.mark.parametrize(("tables", "message"), SECRETS.values(), ids=SECRETS)
def test_secrets_that_make_no_sense(tenants: Path, tables: str, message: str) -> None:
    tenants.write_text(FILE.format(guest="debian-12") + f"secrets = [{tables}]\n")
    with pytest.raises(TenantsError, match=message):
        read_tenants(tenants)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no name"),
        ("name = 3", ":1: name: Expected str"),
        ('name = "Bench!"', ":1: name: 'Bench!' is no name"),
        ('name = "bench"', "tenants: there are none"),
        ("name = ", "not TOML"),
        ('name = "' + "x" * 70_000 + '"', "larger than 64 KiB"),
    ],
)
def test_files_that_want_nothing(tenants: Path, text: str, message: str) -> None:
    tenants.write_text(text)
    with pytest.raises(TenantsError, match=message):
        read_tenants(tenants)


def test_platform_must_carry_all_of_them(tenants: Path) -> None:
    platform = tenants.parent / "platform.toml"
    head = 'platform = "platform.toml"\n'
    cases = {
        "keyid-bits = 1": "its 1 KeyIDs are too few: the VMs take 2",
        'dram = "512M"': "it can have 512 MiB of DRAM, and the VMs take 768 MiB",
        'algorithms = ["aes-xts-256"]': "the platform does not allow aes-xts-128",
        "keyid-bit = 1": "platform.toml:1: keyid-bit: unknown key",
    }
    for text, message in cases.items():
        platform.write_text(text)
        tenants.write_text(head + FILE.format(guest="tiny"))
        with pytest.raises(TenantsError, match=re.escape(message)) as caught:
            read_tenants(tenants)
        assert caught.value.hint is not None


def test_key_of_the_brokers_takes_two_keyids_while_it_is_programmed(tenants: Path) -> None:
    (tenants.parent / "platform.toml").write_text("keyid-bits = 1\n")
    CertificateAuthority.make("test").save(tenants.parent / "ca")
    tenants.write_text(
        'name = "b"\nplatform = "platform.toml"\n[broker]\nurl = "https://b"\ntrust = "ca/ca.pem"\n'
        '[tenants.a]\npolicy = "policy.toml"\nreference = "reference.json"\n[tenants.a.vms.v]\n'
        'guest = "tiny"\nkey = { source = "broker", resource = "a/b/c" }\n'
    )
    with pytest.raises(TenantsError, match="the VMs take 2"):
        read_tenants(tenants)
