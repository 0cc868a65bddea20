"""Files that are written completely or not at all, and the layout of a run's directory."""
