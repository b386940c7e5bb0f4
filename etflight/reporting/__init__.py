"""Results of runs side by side: read from what they left on disk, grouped by arm, written as tables and as a page."""
