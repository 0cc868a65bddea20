"""Before a run: what would stop it, and the memory that it needs."""
