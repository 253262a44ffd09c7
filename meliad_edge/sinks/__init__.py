"""Where events go: each sink behind its own bounded queue, so that none ever holds up the frame loop."""
