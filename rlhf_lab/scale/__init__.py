"""The same training on several processes: starting them, and who of them writes the run."""
