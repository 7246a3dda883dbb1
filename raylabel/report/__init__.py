"""What people look at: tables and units on a terminal, exported files, the summary of a run."""
