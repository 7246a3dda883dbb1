"""Torch only: the subject and the controls. No Ray, no files of the run."""
