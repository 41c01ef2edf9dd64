"""Alerts: what a person should be told of a fleet, once, together, and again when it is over."""
