"""The masks of known models, one family a file, and a catalogue of them with examples."""
