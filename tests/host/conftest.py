"""Fixtures of several files here: both stores, and one PostgreSQL server for all of them."""

from tests.support.stores import postgres, store, store_name

__all__ = ["postgres", "store", "store_name"]
