"""The HTTP server: OpenAI's API, the page that shows the front, metrics; a layer above the engine."""
