"""Winning back what pruning cost: small tensors are trained, expert matrices stay byte for byte as they were."""
