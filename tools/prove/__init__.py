"""Tools that prove a claim of the documentation, each by one command."""
