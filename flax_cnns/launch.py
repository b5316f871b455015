"""The command `python -m flax_cnns.launch`, which job scripts know by this name.

As a module it is `flax_cnns.runtime.launch` itself.
"""

import sys

from flax_cnns.runtime import launch

if __name__ == "__main__":
    sys.exit(launch.main())
sys.modules[__name__] = launch
