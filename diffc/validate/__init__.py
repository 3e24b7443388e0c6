"""Whether a compiled model still computes the same numbers: tolerances and the comparison with Polygraphy."""
