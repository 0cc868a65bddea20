"""Prompts: where they come from, how the student reads them, and the order in which it meets them."""
