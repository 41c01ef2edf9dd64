"""What `fieldvit bench` measures, and how it is told: single-stream queries of several files in turn."""
