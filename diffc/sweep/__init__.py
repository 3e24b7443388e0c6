"""`diffc sweep`: many compiles, on the workers of a Ray cluster, with a row for each."""
