"""Serving engines: their metadata, turned into plans."""
