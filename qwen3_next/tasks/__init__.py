"""Models with a head, and the functions that build them."""
