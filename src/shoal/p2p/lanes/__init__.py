"""Bulk data over several connections to one peer: how many, and which of them carries what."""
