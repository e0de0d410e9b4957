"""Nearest neighbours and Gaussian statistics of embeddings: arithmetic and files, no Ray, no models."""
