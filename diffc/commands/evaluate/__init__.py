"""`diffc evaluate`: pictures of several models, judged by metrics."""
