"""Convolution, attention, and everything between, as one einsum."""
