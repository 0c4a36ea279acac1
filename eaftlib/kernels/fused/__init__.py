"""Triton kernels, imported where a GPU runs them. Each is tested against the plain function of the same name."""
