"""Rows times several tokens. Knows no board and no owner."""
