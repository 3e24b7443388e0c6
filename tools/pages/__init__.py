"""Tables of the documentation, made by compiling and painting with every embedded model."""
