"""Preparing text: tokenize, count, write shards."""
