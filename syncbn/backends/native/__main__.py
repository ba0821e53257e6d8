"""Make the CPU library here: `python -m syncbn.backends.native`."""

import sys

from syncbn.backends.native.compiling import LIBRARY, compile_library

if __name__ == "__main__":
    if reason := compile_library():
        sys.exit(f"The CPU library could not be made: {reason}.")
    print(f"made {LIBRARY}")
