"""The command line: one file per command. A file parses, calls one function, and prints."""
