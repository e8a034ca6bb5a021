"""Complete runs: one file a run, each with `get_config() -> Experiment`."""
