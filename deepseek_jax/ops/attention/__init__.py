"""Attention as functions of arrays."""
