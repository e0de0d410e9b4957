"""Pictures to text latents by a trained network."""
