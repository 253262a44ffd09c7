"""Cameras, videos and folders as one thing: frames with an id and a capture time."""
