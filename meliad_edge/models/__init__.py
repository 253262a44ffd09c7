"""The detectors and the network they share. Importing this package registers every detector."""

from meliad_edge.models import anomem as anomem
from meliad_edge.models import devnet as devnet
from meliad_edge.models import meliad as meliad
from meliad_edge.models import padim as padim
from meliad_edge.models import patchcore as patchcore
from meliad_edge.models import reconstruction as reconstruction
from meliad_edge.models import ssae as ssae
from meliad_edge.models.network import create_detector as create_detector
