"""What a checkpoint says: a model as plain data, written, read, compared."""
