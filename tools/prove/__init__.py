"""Checks that are too slow for a test run, need a GPU, or need files that are downloaded first."""
