"""Training steps of whole models, ours beside PEFT's and the published ways, some of which paper/ has."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "paper"))  # its files import each other by bare names
