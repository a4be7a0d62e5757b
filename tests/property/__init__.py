"""Random traces on the real engine and the real cache, with what must hold checked after every step."""
