"""Hugging Face folders: one adapter a family."""
