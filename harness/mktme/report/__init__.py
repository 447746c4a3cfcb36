# SPDX-License-Identifier: GPL-2.0-or-later
"""A run's report as a page that people open: one HTML file that needs nothing else."""
