"""Training: data, optimisers, schedules, checkpoints and the loop that ties them together."""
