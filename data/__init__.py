"""Code that finds, reads, crops and caches photos."""
