# SPDX-License-Identifier: GPL-2.0-or-later
"""What an attacker does to DRAM, and what the engine makes of it: no VM is needed for that."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mktme.engine.errors import DramError
from mktme.engine.keys import KeyMode
from mktme.engine.xts import Algorithm
from mktme.proof.attacks import ATTACKS, Attack, Scene
from mktme.proof.damage import Damage, Outcome, Written, classify
from mktme.proof.dimms import Dimms, Stored
from mktme.service.client import EngineProcess, EngineRefusedError

PAGE = 4096
LINE = 64


@pytest.fixture
def dimms(tmp_path: Path) -> Dimms:
    (tmp_path / "dram").write_bytes(bytes(range(256)) * 32)
    (tmp_path / "dram.mac").write_bytes(bytes(range(256)) * 2)
    return Dimms(tmp_path / "dram")


def test_lines_and_their_macs(dimms: Dimms) -> None:
    assert dimms.get(LINE) == Stored(bytes(range(64, 128)), bytes([4, 5, 6, 7]))
    assert dimms.get(PAGE, PAGE).macs == bytes(range(256))
    dimms.put(2 * LINE, Stored(b"x" * LINE, b"abcd"))
    assert dimms.get(2 * LINE) == Stored(b"x" * LINE, b"abcd")
    dimms.put_ciphertext(3 * LINE, b"y" * LINE)
    assert dimms.get(3 * LINE) == Stored(b"y" * LINE, bytes([12, 13, 14, 15]))
    assert dimms.get(LINE) == Stored(bytes(range(64, 128)), bytes([4, 5, 6, 7]))


def test_flipping_twice_is_nothing(dimms: Dimms) -> None:
    before = dimms.get(0, 2 * PAGE)
    dimms.flip(5, 3)
    (at,) = (
        index
        for index in range(2 * PAGE)
        if dimms.get(0, 2 * PAGE).ciphertext[index] != before.ciphertext[index]
    )
    assert at == 5
    dimms.flip(5, 3)
    assert dimms.get(0, 2 * PAGE) == before


def test_what_is_not_there(dimms: Dimms) -> None:
    with pytest.raises(DramError, match="no 64 bytes at 0x2000"):
        dimms.get(2 * PAGE)


# --- each attack, seen by a reader with the KeyID -----------------------------------------------


@dataclass
class Bench:
    """Two pages of DRAM under two KeyIDs, and a third KeyID for the attacker."""

    engine: EngineProcess
    algorithm: Algorithm
    keyids: tuple[int, int, int]

    def attempt(self, attack: Attack, *, does: Callable[[Scene], bytes | None]) -> Outcome:
        client = self.engine.client
        dimms = Dimms(Path(client.welcome.dram_path))
        old, page, other, own = (os.urandom(PAGE) for _ in range(4))
        addresses = (4 * PAGE, 9 * PAGE)
        client.write_dram(addresses[0], old, self.keyids[0])
        recorded = dimms.get(addresses[0], PAGE)
        client.write_dram(addresses[0], page, self.keyids[0])
        client.write_dram(addresses[1], other, self.keyids[1])
        scene = Scene(dimms, client, self.keyids[2], addresses[: attack.guests], recorded, own)
        try:
            read = does(scene)
            if read is not None:
                return classify(read, Written(page, None, (own,)), attack.lines).outcome
        except EngineRefusedError as error:
            if error.error != "IntegrityError":
                raise
            return Outcome.REFUSED
        written = Written(page, old, (own, other))
        return self.look(addresses[0], written, attack.lines).outcome

    def look(self, address: int, written: Written, lines: int) -> Damage:
        try:
            found = self.engine.client.read_dram(address, PAGE, self.keyids[0])
        except EngineRefusedError as error:
            if error.error != "IntegrityError":
                raise
            return Damage(Outcome.MACHINE_CHECK)  # what a guest gets of it
        return classify(found, written, lines)


@pytest.fixture(params=[Algorithm.AES_XTS_128, Algorithm.AES_XTS_128_INTEGRITY])
def bench(engine: EngineProcess, request: pytest.FixtureRequest) -> Iterator[Bench]:
    algorithm: Algorithm = request.param
    client = engine.client
    one, other, third = (client.program_key(KeyMode.RANDOM, algorithm) for _ in range(3))
    yield Bench(engine, algorithm, (one, other, third))
    for keyid in (one, other, third):
        client.clear_key(keyid)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_what_comes_of_an_attack(bench: Bench, attack: Attack) -> None:
    expected = attack.expected(bench.algorithm.has_integrity)
    assert bench.attempt(attack, does=attack.strike) is expected


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_that_was_not_made_is_noticed(bench: Bench, attack: Attack) -> None:
    """The control: a suite whose attacks do nothing does not pass, nor one with no control."""
    expected = attack.expected(bench.algorithm.has_integrity)
    assert (bench.attempt(attack, does=lambda _scene: None) is expected) == attack.control


def test_attacks_are_told_apart_by_their_names() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
    assert [attack.name for attack in ATTACKS if attack.control] == ["none"]
    without = {attack.without for attack in ATTACKS}
    with_integrity = {attack.with_integrity for attack in ATTACKS}
    assert Outcome.OTHER not in without | with_integrity
    assert Outcome.MACHINE_CHECK not in without
