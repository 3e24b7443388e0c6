"""What each command of the command line does, as functions to call from Python."""
