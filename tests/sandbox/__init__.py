"""The sandbox: strict local stand-ins for the three providers, and the real service beside them.

`python -m tests.sandbox` runs a job on it; the tests use `Sandbox` and `Service` as fixtures.
"""

from .ports import PortTaken
from .providers import Sandbox
from .service import Service

__all__ = ["PortTaken", "Sandbox", "Service"]
