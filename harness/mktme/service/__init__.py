# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine as a process of its own: server, client, wire types."""
