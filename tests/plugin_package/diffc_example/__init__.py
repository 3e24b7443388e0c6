"""What a package can add to diffc: the smallest example of each kind."""
