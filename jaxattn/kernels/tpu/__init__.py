"""Windowed attention as Pallas kernels for a TPU: `plan` decides, `arrange` lays out, `forward` and `backward` compute.

Nothing here imports Pallas but the two kernels and what they share (`block`), and those are imported when they run.
"""
