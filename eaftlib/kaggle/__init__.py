"""Runs on Kaggle's GPUs: build a notebook, push it, follow it, bring its verified result back."""
