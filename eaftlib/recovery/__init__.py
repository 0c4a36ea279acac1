"""Winning back what pruning cost: small tensors are trained, expert matrices stay byte for byte as they were."""

SCHEMA = "eaft-recovery/1"
RECORD, TENSORS = "recovery.json", "trained.safetensors"  # what a run leaves beside its checkpoint
