"""Quality in numbers: what a compiled pipeline paints, judged against what was asked of it."""
