"""A miniature world with trained miniature models: latentmill's embedded default and test bench."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
"""Folder of the shipped weights: ``prior``, ``decoder``, ``stable-diffusion``, ``oracle``."""
