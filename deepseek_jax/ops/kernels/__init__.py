"""Fast paths of one back end; each has a slow reference twin elsewhere in `ops`."""
