"""Rollouts: a release goes to a few boards, then to more, and back from all where it does harm."""
