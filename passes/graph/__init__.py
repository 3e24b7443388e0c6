"""What all passes use to read and edit graphs."""
