"""How rows of hidden states are cut up for the GPU; read by the kernels and by the host."""

from __future__ import annotations

BLOCK = 1024
"""Columns of one program, of lookups in the embedding and of sums of rows."""
