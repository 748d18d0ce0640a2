"""Trackers that a run's figures are sent to."""
