"""Flax modules, each beside the frozen dataclass that configures it."""
