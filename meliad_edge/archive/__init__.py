"""Scoring archives of any size: what is in them, units of work, the workers that score them, and the result."""
