"""Runs the built-in subject: its model, and the text it reads."""
