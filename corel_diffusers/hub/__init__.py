"""The Hub: model cards and uploads."""
