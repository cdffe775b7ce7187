"""Decoders that know nothing of adapters, and the steps of a serving loop over them."""
