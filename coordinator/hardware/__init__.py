"""What this machine was measured to do, and what was tuned for it. Starts no engine."""
