# SPDX-License-Identifier: GPL-2.0-or-later
"""Coverage-guided fuzzing of every decoder, with atheris on libFuzzer.

``make fuzz`` runs all targets side by side, two minutes in all (``FUZZ_SECONDS=600 make fuzz`` for
ten); ``python -m tests.fuzz --seconds 60 hello platform`` runs two of them for one. A target that
lets out what its decoder does not document, or breaks what must hold, fails the run; the report
gives the traceback and the input, and how to run that input again.

- `targets`: what is fuzzed, one function over bytes each, with valid messages to start from.
- `mutate`: changes that keep an input's structure, where bytes alone seldom do.
- `child`: the process of one target: libFuzzer ends the process that it runs in.
- `campaign`: runs the children and judges what they report.

Inputs that reached something new stay in ``build/fuzz/corpus`` for the next run.
"""
