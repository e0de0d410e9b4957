"""Pictures to noise latents."""
