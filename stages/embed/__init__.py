"""Pictures to image embeddings."""
