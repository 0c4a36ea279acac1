"""Conversations to completion spans to blocks of tokens."""
