"""Engines: what they have in hand, turned into plans."""
