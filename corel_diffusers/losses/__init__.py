"""The losses: pure functions with their equations, and the perceptual loss with its frozen network."""
