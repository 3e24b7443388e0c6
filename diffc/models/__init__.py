"""Which backbone: the embedded models, where a MODEL of the command line lies, and the families as data."""
