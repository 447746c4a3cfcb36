# SPDX-License-Identifier: GPL-2.0-or-later
"""The process of one target, which libFuzzer takes over, and ends.

``python -m tests.fuzz.child TARGET FILE...`` runs inputs once, which reproduces a finding;
``--fuzz DIRECTORY SECONDS TARGET`` is how `campaign` starts it.
"""

from __future__ import annotations

import argparse
import logging
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Final

import atheris

from .target import Target
from .targets import load

INPUT_TIMEOUT_S: Final = 10
RSS_LIMIT_MIB: Final = 1024

_OUTCOMES: Final = 1024


def main() -> None:
    """Run one target as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.child")
    parser.add_argument("--fuzz", nargs=2, metavar=("DIRECTORY", "SECONDS"))
    parser.add_argument("target")
    parser.add_argument("files", nargs="*")
    options = parser.parse_args()
    # tomllib decodes for us, and is Python too.
    with atheris.instrument_imports(include=["mktme", "tomllib"]):
        target = load(options.target)
    logging.disable()
    for file in options.files:
        target.check(Path(file).read_bytes())
    if not options.fuzz:
        return
    directory, seconds = options.fuzz
    arguments = _prepare(target, Path(directory), int(seconds))
    keywords = {"custom_mutator": _mutator(target)} if target.mutate else {}
    atheris.Setup([sys.argv[0], *arguments], _guided(target.check), **keywords)
    atheris.Fuzz()


def _prepare(target: Target, directory: Path, seconds: int) -> list[str]:
    """Lay out seeds and tokens; returns libFuzzer's arguments."""
    corpus = directory / "corpus" / target.name
    findings = directory / "findings"
    for path in (corpus, findings):
        path.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(target.seeds):
        (corpus / f"seed-{index:02}").write_bytes(seed)
    arguments = [
        f"-max_total_time={seconds}",
        f"-max_len={target.max_bytes}",
        f"-timeout={INPUT_TIMEOUT_S}",
        f"-rss_limit_mb={RSS_LIMIT_MIB}",
        f"-artifact_prefix={findings}/{target.name}-",
        "-print_final_stats=1",
        # Seeds that differ only inside an extension look alike.
        "-keep_seed=1",
    ]
    if target.tokens:
        tokens = directory / f"{target.name}.tokens"
        tokens.write_text("".join(f'"{_escaped(token)}"\n' for token in target.tokens))
        arguments.append(f"-dict={tokens}")
    return [*arguments, str(corpus)]


def _escaped(token: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in token)


def _guided(check: Callable[[bytes], str | None]) -> Callable[[bytes], None]:
    """Make coverage of outcomes: each has a function of its own, and these are instrumented."""
    landmarks = [_landmark() for _ in range(_OUTCOMES)]

    def check_and_tell(data: bytes) -> None:
        outcome = check(data)
        if outcome is not None:
            landmarks[zlib.crc32(outcome.encode()) % _OUTCOMES]()

    return check_and_tell


def _landmark() -> Callable[[], None]:
    def reached() -> None:
        pass

    instrumented: Callable[[], None] = atheris.instrument_func(reached)
    return instrumented


def _mutator(target: Target) -> Callable[[bytes, int, int], bytes]:
    """Change structure or bytes; libFuzzer applies several changes to an input by itself."""
    mutate = target.mutate
    assert mutate is not None

    def mutator(data: bytes, max_bytes: int, seed: int) -> bytes:
        rng = Random(seed)
        if rng.getrandbits(1):
            changed = mutate(data, rng)
            if changed is not None and len(changed) <= max_bytes:
                return changed
        of_bytes: bytes = atheris.Mutate(data, max_bytes)
        return of_bytes

    return mutator


if __name__ == "__main__":
    main()
