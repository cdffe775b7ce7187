"""OpenAI's API over an engine: HTTP, streams, adapters that come and go, limits and metrics."""
