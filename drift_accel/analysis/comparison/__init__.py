"""Generated activations against real ones: measures, embeddings, tables and a page."""
