"""`simsid scan`."""

import json
import sys
from dataclasses import dataclass

from simsid.commands.common import Data, Exclude
from simsid.errors import UsageError


@dataclass(frozen=True)
class Scan:
    """Read every image of a folder and list what it holds: formats, sizes, depths, and why files are rejected."""

    data: Data
    """Folder of images (any depth), or a CSV with a path column."""
    json: bool = False
    """Print JSON instead of text."""
    exclude: Exclude = ()
    """Files to leave out, as patterns of their path below the folder, such as masks/*."""
    workers: int = 0
    """Threads that decode images; 0 is one per core."""

    def run(self) -> int:
        """Scan and print; the exit status is 1 when a file is rejected, 2 when no image can be read."""
        from simsid.data import scan

        if self.workers < 0:
            raise UsageError(f"workers must be at least 0, got {self.workers}")
        found = scan(self.data, workers=self.workers or None, progress=sys.stderr.isatty(), exclude=self.exclude)
        print(json.dumps(found.as_dict(), indent=1) if self.json else found)
        if not found.readable:
            return 2
        return 1 if found.failures else 0
