"""Pure functions on arrays; no Flax, no configs."""
