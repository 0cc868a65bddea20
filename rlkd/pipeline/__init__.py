"""The left half of the line: from prompts to a Batch."""
