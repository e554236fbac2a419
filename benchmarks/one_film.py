"""How long one film takes on the command line: `python benchmarks/one_film.py MODEL FILE [options of simsid score]`.

Prints seconds of the imports and of all that follows, model loading included, on the clock and of CPU time.
"""

import sys
import tempfile
import time


def main() -> None:
    """Import everything first, then score the film into a temporary folder."""
    clock, cpu = time.perf_counter(), time.process_time()
    import matplotlib  # noqa: F401
    import torch  # noqa: F401

    import simsid.commands.main as command_line
    import simsid.models
    import simsid.report.selection
    import simsid.scoring  # noqa: F401

    print(f"imports  {time.perf_counter() - clock:.2f} s, {time.process_time() - cpu:.2f} s of CPU time", flush=True)
    clock, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            command_line.main(["score", *sys.argv[1:], "-o", folder])
        except SystemExit as stop:
            if stop.code:
                raise
    late = sorted({"torch._dynamo", "sympy", "sklearn", "triton"} & set(sys.modules))
    print(f"one film {time.perf_counter() - clock:.2f} s, {time.process_time() - cpu:.2f} s of CPU time")
    print(f"heavy modules imported on the way: {', '.join(late) or 'none'}")


if __name__ == "__main__":
    main()
