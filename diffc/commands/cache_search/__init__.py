"""`diffc cache search`: which blocks to use again, and when, for a given speed-up."""
