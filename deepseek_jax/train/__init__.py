"""Training: experiment, state, objective, step, loop, checkpoints, metrics, evaluation."""
