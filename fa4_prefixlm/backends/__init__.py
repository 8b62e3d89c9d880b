"""The backends, one a file: each a verdict on a call and a prepared state that runs it. `select` chooses."""
