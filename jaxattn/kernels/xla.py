"""Windowed attention in tiles (for now, the reference)."""

from jaxattn.kernels.reference import attend
