"""Worker processes: started, watched, ended, replaced. Knows nothing of models."""
