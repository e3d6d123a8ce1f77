"""From photos to batches: sources, layouts, splits, decoding, caches, latents, features."""
