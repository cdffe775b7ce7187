"""A small trained model with its adapters, and the tasks that the adapters do."""
