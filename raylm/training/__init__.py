"""The step and everything around it. `run.run_training` is what `raylm.train` calls."""
