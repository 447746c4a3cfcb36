# SPDX-License-Identifier: GPL-2.0-or-later
"""The two ways in which guest memory reaches the engine."""

from __future__ import annotations

import enum


class DataPath(enum.Enum):
    """How guest memory reaches the engine; the value is the word that users write."""

    SHADOW = "shadow"
    """Every write to guest RAM is mirrored, encrypted, into DRAM (`mktme.datapath.shadow`)."""
    INLINE = "inline"
    """DRAM is the only memory, RAM a bounded window onto it (`mktme.datapath.inline`)."""
