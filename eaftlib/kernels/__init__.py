"""One kernel a file, each with a plain PyTorch reference."""
