"""What host, converters, boards and monitor agree on: manifests, bundles, boards, topics and messages.

Standard library only, so that any part, and any script on a board, can import it.
"""
