"""Blocks of tokens through the layers of a model: where, in which types, by which functions, and what is noted."""
