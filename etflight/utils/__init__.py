"""Shared helpers: errors, files, checkpoints, classes as plain data, limits on what others wrote."""
