"""From prompts to completions: a batch of rows, each with its adapter."""
