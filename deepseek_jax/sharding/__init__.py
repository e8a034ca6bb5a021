"""One mesh, one table from logical axis names to mesh axes, and its presets."""
