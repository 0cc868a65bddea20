"""vLLM processes: starting, watching, and talking to them."""
