"""A few pictures to word embeddings."""
