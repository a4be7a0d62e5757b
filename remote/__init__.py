"""The far tier: knows network, never the cache."""
