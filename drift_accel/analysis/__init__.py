"""Looking at runs and models: the report of a run."""
