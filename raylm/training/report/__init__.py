"""The report of a run: what it was, what came of it, and on what."""
