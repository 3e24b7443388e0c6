"""`diffc mix`: layers of one model in several formats."""
