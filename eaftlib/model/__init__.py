"""A store of tensors: what an architecture is called and how its layer is built."""
