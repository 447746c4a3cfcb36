# SPDX-License-Identifier: GPL-2.0-or-later
"""`mktme quote` as a user runs it: with an ssh that stays on this machine, and a TPM of swtpm's."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mktme.attest.identity import Identity
from mktme.attest.reference import Reference
from mktme.attest.tpm_keys import TpmKey
from mktme.attest.tpm_quote import TpmQuote, verify_quote
from mktme.vm.guest_tpm import EVENT_LOG, take_quote

from .attest.signing import NONCE, Platform
from .attest.soft_tpm import BOOT, SoftTpm, encode_log, soft_tpm
from .command import Mktme, runner

# What a guest's paths are here; the options that ssh was given are kept for the test.
SSH = """#!/bin/sh
echo "$@" >{directory}/asked
while [ "$1" != -- ]; do shift; done
shift 2
PATH={directory}/bin:$PATH exec sh -c "$(printf %s "$*" | sed \
    's,{log},{directory}/log,g; s,/run/mktme-quote,{directory}/work,g; s,tpm2_startauth,{flush},')"
"""
FLUSH = "tpm2_flushcontext -t; tpm2_flushcontext -l; tpm2_startauth"
SUDO = '#!/bin/sh\nshift\nexec "$@"\n'


@pytest.fixture(scope="module")
def guest() -> Iterator[SoftTpm]:
    with tempfile.TemporaryDirectory(prefix="mt-") as name, soft_tpm(Path(name)) as tpm:
        directory = tpm.directory
        tpm.extend(BOOT)
        (directory / "log").write_bytes(encode_log(BOOT))
        (directory / "bin").mkdir()
        scripts = {"ssh": SSH.format(directory=directory, log=EVENT_LOG, flush=FLUSH), "sudo": SUDO}
        for script, text in scripts.items():
            (directory / "bin" / script).write_text(text)
            (directory / "bin" / script).chmod(0o755)
        tpm.environment["PATH"] = f"{directory}/bin:{os.environ['PATH']}"
        yield tpm


@pytest.fixture
def mktme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mktme:
    return runner(monkeypatch, capsys)


def test_answer_is_kept_and_true(
    mktme: Mktme, guest: SoftTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PATH", "TPM2TOOLS_TCTI"):
        monkeypatch.setenv(name, guest.environment[name])
    path = tmp_path / "quote.json"
    result = mktme("quote", "root@guest", "-p", "2222", "-i", tmp_path / "key", "-o", path)
    assert result.code == 0, result.said
    nonce = re.search(r"^nonce ([0-9a-f]{64})$", result.out, re.M)
    assert nonce is not None
    quote = TpmQuote.decode(path.read_bytes())
    endorsement = TpmKey.parse(quote.endorsement_key).sha256
    assert verify_quote(quote, vtpm=endorsement, nonce=bytes.fromhex(nonce[1])).commands
    asked = (guest.directory / "asked").read_text()
    assert asked.startswith(f"-o BatchMode=yes -p 2222 -i {tmp_path}/key -- root@guest sudo -n sh")
    assert not (guest.directory / "work").exists()

    again = mktme("quote", "root@guest", "-o", path)
    assert again.code == 2
    assert "quote.json" in again.said


def test_guest_without_a_tpm(mktme: Mktme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\necho 'ssh: connect to host guest port 22: no'\nexit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = mktme("quote", "guest", "-o", tmp_path / "quote.json")
    assert result.code == 4
    assert "connect to host guest" in result.said
    assert "hint: it needs --vtpm" in result.said
    assert not (tmp_path / "quote.json").exists()


def test_verify_shows_the_boot_or_refuses(
    mktme: Mktme, guest: SoftTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quote, secret = take_quote(
        guest, event_log=str(guest.directory / "log"), directory=str(guest.directory / "work")
    )
    platform = Platform(Identity.create())
    vm = platform.vm(vtpm=TpmKey.parse(quote.endorsement_key).sha256)
    evidence = platform.evidence(vm, issued_at=int(time.time()))
    for name, data in (
        ("evidence.cwt", platform.sign(evidence)),
        ("quote.json", quote.encode()),
        ("ca.pem", platform.identity.root_pem()),
        ("policy.toml", b'name = "boot"\nvtpm = true\nquote = true\n'),
    ):
        Path(name).write_bytes(data)
    asked = ("--quote", "quote.json", "--quote-nonce", secret.hex())
    made = mktme("reference", "evidence.cwt", "--trust", "ca.pem", "-o", "good.json", *asked)
    assert made.code == 0, made.said
    assert set(Reference.load(Path("good.json")).pcrs) == {0, 2, 3, 4, 6, 7, 8, 9}

    verify = ["verify", "evidence.cwt", "--trust", "ca.pem", "--policy", "policy.toml"]
    verify += ["--reference", "good.json", "--nonce", NONCE.hex()]
    good = mktme(*verify, *asked)
    assert good.code == 0, good.said
    assert "Measured boot" in good.said
    assert "linux /vmlinuz quiet" in good.said
    assert max(map(len, good.out.splitlines())) <= 80

    document = msgspec.json.decode(mktme(*verify, *asked, "--json").out)
    boot = document["submods"][str(vm.uuid)]["mktme.boot"]
    assert boot["commands"] == ["linux /vmlinuz quiet", "/vmlinuz quiet"]

    for changes, check in (
        ((), "vtpm:quote"),
        (("--quote", "quote.json", "--quote-nonce", "00" * 32), "vtpm:nonce"),
        (("--quote", "ca.pem", "--quote-nonce", secret.hex()), "vtpm:quote"),
    ):
        refusal = mktme(*verify, *changes)
        assert refusal.code == 1
        assert f"FAIL {check}" in refusal.said
        assert "Measured boot" not in refusal.said
    assert mktme(*verify, "--quote", "quote.json").code == 2
    trusted = ("reference", "evidence.cwt", "--trust", "ca.pem", "-o", "bad.json")
    bad = mktme(*trusted, *asked[:3], "00")
    assert bad.code == 1
    assert not Path("bad.json").exists()
