"""Build models from configs: VAE, UNet, discriminator, the frozen EfficientNet."""
