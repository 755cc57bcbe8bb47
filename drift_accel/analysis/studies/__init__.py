"""Variants of a recipe, each with several seeds: trained, judged, compared."""
