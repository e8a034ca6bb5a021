"""The notebook's front door: override, init, run a few steps, compare, look inside."""
