"""torchrun, the same arguments, without its page of tracebacks when a rank fails or Ctrl-C is pressed.

The ranks say what is wrong, and still all of them end; the exit code is that of the first one that failed.
"""

import os
import sys


def main() -> int:
    # torchrun forwards SIGINT, for which each rank prints a traceback; as an exception in here it ends them by SIGTERM.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGHUP,SIGQUIT")
    # torch keeps one store for all attempts, with the addresses of dead ranks in it: one in a few restarts would hang.
    # Here the attempts' numbers are the same on all nodes (with a c10d rendezvous of several they would not be).
    os.environ["STORE_PER_ATTEMPT"] = "1"
    try:
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import main as torchrun

        try:
            torchrun()
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            print(f"rank {rank} failed with exit code {failure.exitcode}; all ranks have ended", file=sys.stderr)
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as error:
            return 128 + error.sigval
    except KeyboardInterrupt:
        print("interrupted; all ranks have ended", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
