"""The sections of a configuration, a file for each or for a few that belong together."""
