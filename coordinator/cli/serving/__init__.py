"""`warmfront serve`: its declaration, and what it says; the server is in coordinator/serve/."""
