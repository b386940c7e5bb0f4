"""The run folder: what a run leaves in it, and the loggers it writes to."""
