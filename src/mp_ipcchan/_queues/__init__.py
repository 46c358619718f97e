"""Queues: many processes put, many take, none locks."""
