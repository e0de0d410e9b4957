"""Prompts to image embeddings."""
