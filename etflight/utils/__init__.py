"""What all rooms need: errors, files, checkpoints, classes as plain data, limits on what others wrote."""
