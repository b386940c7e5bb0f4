"""Commands that are no Trainer stage."""
