"""How a stage runs over a sharded dataset on Ray, and how its output is committed."""
