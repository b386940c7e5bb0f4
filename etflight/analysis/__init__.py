"""What a trained model shows over a split of the data, computed without the command line."""
