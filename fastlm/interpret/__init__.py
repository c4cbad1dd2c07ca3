"""What a model attends to: maps, statistics and plots."""
