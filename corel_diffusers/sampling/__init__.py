"""Samplers, and samples from a trained pipeline."""
