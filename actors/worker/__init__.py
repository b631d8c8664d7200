"""The attention worker: engine loop, dispatcher, loads."""
