"""Train a latent diffusion model from scratch on your own photos: VAE, UNet, pipeline, Hub."""

__version__ = "0.1.0"
