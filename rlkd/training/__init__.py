"""The right half of the line: forward, loss, backward and step, from nothing but a Batch."""
