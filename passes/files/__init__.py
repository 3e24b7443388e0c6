"""Files: names that stay in their folder, and writing that never leaves half a file."""
