"""Image embeddings to pictures, by the decoders that people use."""
