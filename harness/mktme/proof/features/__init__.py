# SPDX-License-Identifier: GPL-2.0-or-later
"""Does all that a VM does still work: real guests and devices, on both data paths.

`rows` has what is checked, `scenarios` the guests that it is checked in, `table` the runs of them
and the table that they give.
"""
