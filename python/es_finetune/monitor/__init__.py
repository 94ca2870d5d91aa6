"""What a run shows: rows of numbers, health, advice, progress, plots and the report."""
