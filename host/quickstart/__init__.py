"""The whole loop in one verb: recipe, bundle, signed repository, monitor, board, lesson, bad updates, report."""
