"""Which back-ends serve CPU tensors here: the C library where an installation could compile it."""

import pytest
import torch

from syncbn import backends
from syncbn.backends import cpu_library

HAS_LIBRARY = cpu_library.library() is not None
ON_CPU = backends.name_for(torch.empty(0))
"""The name of the one that does."""
BACKENDS = ("reference", "cpu") if HAS_LIBRARY else ("reference",)
needs_library = pytest.mark.skipif(
    not HAS_LIBRARY, reason="there is no CPU library: no C compiler, or SYNCBN_CPU=torch"
)
