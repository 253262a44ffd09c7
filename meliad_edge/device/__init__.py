"""Edge devices: what a machine is and has."""
