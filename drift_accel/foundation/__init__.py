"""What every other room stands on: random streams, storage, collectives, provenance, the run folder, progress."""
