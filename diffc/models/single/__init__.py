"""Single files: which backbone one holds, by which converter of diffusers, and what else is in it."""
