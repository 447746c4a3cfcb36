# SPDX-License-Identifier: GPL-2.0-or-later
"""The Ansible collection, without VMs: it installs, its documentation is that of its options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from .provision.bench import write_files

COLLECTION = Path(__file__).parents[2] / "ansible"
MODULES = ("mktme_vm", "mktme_attest")
TIMEOUT_S = 110

Ansible: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def ansible(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ansible]:
    """Ansible's tools, with the collection as it is installed."""
    home = tmp_path_factory.mktemp("ansible")
    # Not there: the paths of UNIX sockets are short.
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp") as tmpdir:
        environment = os.environ | {
            "TMPDIR": tmpdir,
            "ANSIBLE_HOME": str(home / "home"),
            "ANSIBLE_COLLECTIONS_PATH": str(home / "collections"),
            "ANSIBLE_REMOTE_TMP": str(home / "remote"),
            "ANSIBLE_LOCAL_TEMP": str(home / "local"),
            "ANSIBLE_NOCOLOR": "1",
        }

        def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [str(Path(sys.executable).parent / tool), *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )

        target = ("-p", str(home / "collections"))
        done = run("ansible-galaxy", "collection", "install", "--offline", str(COLLECTION), *target)
        assert done.returncode == 0, done.stderr
        yield run
        assert list(Path(tmpdir).iterdir()) == []


def play(ansible: Ansible, directory: Path, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run tasks here, one after the other whatever becomes of them; returns their results."""
    results = directory / "results.json"
    steps: list[dict[str, Any]] = [
        one | {"register": f"result{number}", "ignore_errors": True}
        for number, one in enumerate(tasks)
    ]
    names = ", ".join(f"result{number}" for number in range(len(tasks)))
    content = {"dest": str(results), "content": f"{{{{ [{names}] | to_json }}}}"}
    steps.append({"ansible.builtin.copy": content, "check_mode": False})
    variables = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    book = {"hosts": "localhost", "gather_facts": False, "vars": variables, "tasks": steps}
    path = directory / "play.yml"
    path.write_text(json.dumps([book]))
    done = ansible("ansible-playbook", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(results.read_text())
    return found


def test_both_modules_are_documented(ansible: Ansible) -> None:
    done = ansible("ansible-doc", "--json", *(f"mktme.bench.{name}" for name in MODULES))
    assert done.returncode == 0, done.stderr
    documented = json.loads(done.stdout)
    for name in MODULES:
        one = documented[f"mktme.bench.{name}"]
        assert one["doc"]["short_description"]
        assert one["examples"].lstrip().startswith("- name: ")
        assert one["return"]
        text = ansible("ansible-doc", f"mktme.bench.{name}")
        assert text.returncode == 0
        assert f"mktme.bench.{name}" in text.stdout


@pytest.mark.parametrize("name", MODULES)
def test_documentation_is_that_of_the_options(ansible: Ansible, name: str) -> None:
    """What ansible-test's validate-modules compares, which needs the network for its tools."""
    done = ansible("ansible-doc", "--json", f"mktme.bench.{name}")
    documented = json.loads(done.stdout)[f"mktme.bench.{name}"]["doc"]["options"]
    source = (COLLECTION / "plugins" / "modules" / f"{name}.py").read_text()
    spec = _argument_spec(source)

    def compare(spec: dict[str, Any], documented: dict[str, Any]) -> None:
        assert spec.keys() == documented.keys()
        for option, of in spec.items():
            says = documented[option]
            for key in ("type", "choices", "default", "elements"):
                assert of.get(key) == says.get(key), (option, key)
            assert of.get("required", False) == says.get("required", False), option
            assert says["description"]
            if "options" in of:
                compare(of["options"], says["suboptions"])

    compare(spec, documented)


def _argument_spec(source: str) -> dict[str, Any]:
    """A module's options, taken out of its source: it can be imported by Ansible alone."""
    text = source[source.index("\n_OPTIONS") :]
    text = text[text.index("= dict(") + 2 : text.index("\n)\n") + 2]
    deployment = {"type": "str", "default": "default"}
    spec: dict[str, Any] = eval(text, {"DEPLOYMENT": deployment, "dict": dict})
    return spec


def test_modules_without_a_platform(ansible: Ansible, tmp_path: Path) -> None:
    """In one run, since each takes seconds to start: what they would do, and what they refuse."""
    write_files(tmp_path)
    files = {
        "policy": str(tmp_path / "policy.toml"),
        "reference": str(tmp_path / "reference.json"),
    }
    vm = {"deployment": "unit", "tenant": "alice", "name": "web"}
    tiny = vm | files | {"guest": "tiny"}
    secret = {"file": str(tmp_path / "token"), "path": "/run/x"}
    wrong = [
        (vm | {"guest": "tiny"}, "missing: policy, reference"),
        (vm | files, "any of the following are missing: guest, image"),
        (tiny | {"memory": "1M"}, "1 MiB are too little for a guest; memory = 192M or more"),
        (tiny | {"secrets": [secret]}, "guest tiny has no ssh to hand them over"),
        (tiny | {"policy": files["reference"]}, "policy: not a TOML file"),
    ]
    attest = vm | files
    create, absent, nobody, *refused = play(
        ansible,
        tmp_path,
        [
            {"mktme.bench.mktme_vm": tiny, "check_mode": True, "diff": True},
            {"mktme.bench.mktme_vm": vm | {"state": "absent"}},
            {"mktme.bench.mktme_attest": attest},
            *({"mktme.bench.mktme_vm": options} for options, _message in wrong),
        ],
    )
    assert (create["changed"], create["action"]) == (True, "create")
    assert {"field": "memory", "old": "-", "new": "512M"} in create["changes"]
    assert "vm" not in create
    assert "memory: 512M" in create["diff"]["after"]
    assert (absent["changed"], absent["action"]) == (False, "unchanged")
    assert nobody["failed"]
    assert nobody["msg"].startswith("there is no deployment unit; mktme.bench.mktme_vm makes one")
    for result, (_options, message) in zip(refused, wrong, strict=True):
        assert result["failed"]
        assert message in result["msg"]
