"""The numeric kernels: each a plain PyTorch function, and in ``fused`` the same as one Triton kernel a file."""
