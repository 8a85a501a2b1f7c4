"""What all tests share: how hypothesis searches."""

import os

from hypothesis import settings

# CI repeats itself (derandomize), a developer's machine looks elsewhere each time. No deadline: a shared machine is
# slow at times, not wrong.
settings.register_profile("plumb", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("plumb")
