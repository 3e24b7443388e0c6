"""What a cache plan adds to a compile: more models over the same weights, their checks and engines."""
