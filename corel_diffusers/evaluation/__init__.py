"""Measure the quality of samples and count copies of training photos, reliably with a few hundred photos."""
