"""Larger and smaller models that begin where another is."""
