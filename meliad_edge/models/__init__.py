"""The detectors and the network they share. Importing this package registers every detector."""

from meliad_edge.models import meliad as meliad
from meliad_edge.models import reconstruction as reconstruction
from meliad_edge.models.network import create_detector as create_detector
