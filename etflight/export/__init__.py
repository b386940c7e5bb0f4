"""A trained model for programs that do not know etflight."""
