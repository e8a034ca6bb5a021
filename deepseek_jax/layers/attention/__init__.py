"""Attention kinds: one file a kind, its config beside its module."""
