"""Dagster: thin adapters around the other parts, one file a concern. Decisions and I/O live there, not here.

Modules with decorated functions or resources do without `from __future__ import annotations`, because Dagster reads
their annotations.
"""
