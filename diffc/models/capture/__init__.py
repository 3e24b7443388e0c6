"""Reads the interface of a backbone off a few calls of its pipeline, with stand-ins for everything else."""
