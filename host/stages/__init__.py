"""The stages of a recipe: train, quantize, export. Each reads the ones before it and writes its own directory."""
