"""`diffc doctor --run`: every engine and graph of an artifact runs once here, and one file tells what came of it."""
