"""`diffc report`: an artifact, two of them, or a sweep as one HTML file that needs no network and runs no script."""
