"""Compiling for hardware that is not here: memory, cost, time of a step, and what to change."""
