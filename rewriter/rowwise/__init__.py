"""What treats tokens apart: a rule an operation, for stages in tiles and for batches that are padded."""
