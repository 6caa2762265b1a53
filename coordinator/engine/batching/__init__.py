"""Requests of many callers, computed side by side."""
