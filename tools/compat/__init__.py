"""What compilers and runtimes take, probed by small networks: `python -m tools.compat` writes compat.json."""
