"""Build models from configs: VAE, UNet, discriminator, frozen feature networks."""
