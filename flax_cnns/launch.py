"""The command `python -m flax_cnns.launch`.

Imported as a module, `flax_cnns.launch` is `flax_cnns.runtime.launch`.
"""

import sys
from typing import TYPE_CHECKING

from flax_cnns.runtime import launch

if TYPE_CHECKING:
    from flax_cnns.runtime.launch import *  # noqa: F403

if __name__ == "__main__":
    sys.exit(launch.main())
sys.modules[__name__] = launch
