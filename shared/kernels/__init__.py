"""Compiled arithmetic on packed rows, and how it is compiled. Knows no process and no message."""
