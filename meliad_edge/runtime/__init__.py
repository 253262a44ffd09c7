"""Executing exported models; nothing here imports torch."""
