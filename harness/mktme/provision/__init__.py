# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs of several tenants as a file describes them: planned, made, attested, given their secrets.

::

    tenants.py      what is wanted; tenants_file.py reads it from a tenants.toml
    state.py        what there is: facts, VM by VM
    plan.py         what is to be done: wanted x there is -> steps; a pure function
    apply.py        does it, step by step
    attestation.py  asks for evidence and appraises it
    guests.py       the VMs themselves, on a `mktme.vm.platform.Platform`
    secrets.py      application secrets: marks to compare them by, and the way into a guest
    wire.py daemon.py client.py    the process that holds the VMs, and how to ask it
"""
