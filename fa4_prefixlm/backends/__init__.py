"""The backends, one a file. Each judges whether it runs a call exactly, and prepares it. `select` chooses."""
