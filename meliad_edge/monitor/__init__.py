"""Watching the watcher: latency and, later, the condition of camera and scores."""
