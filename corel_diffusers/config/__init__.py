"""The flags as dataclasses, and their checks. Nothing here imports torch."""
