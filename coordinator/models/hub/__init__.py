"""Models on the Hugging Face hub, by name: which files one is, fetching them, finding them in the hub's own cache."""
