"""Functions that put the pieces together into one run."""
