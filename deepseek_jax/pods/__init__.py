"""Planning for machines that are not here: what a pod of them would do with a model."""
