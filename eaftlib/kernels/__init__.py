"""The numeric kernels: each a plain PyTorch function, and in ``fused`` the same as one Triton kernel a file."""

import torch


def use_fused(device: torch.device) -> bool:
    """Whether Triton kernels serve: on NVIDIA GPUs from Ampere on, and only without gradients, for they have none."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and not torch.is_grad_enabled()
