"""New pictures of what models rarely draw."""
