"""`simsid convert`."""

import pathlib
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from simsid.commands.calibrate import Calibrate
from simsid.commands.common import Machine, Output, output_folder
from simsid.errors import UsageError


@dataclass(frozen=True)
class Convert:
    """Convert the released code's model.pth and discriminator.pth to a model folder."""

    generator: Positional[Annotated[pathlib.Path, arg(metavar="GENERATOR")]]
    """model.pth."""
    discriminator: Positional[Annotated[pathlib.Path, arg(metavar="DISCRIMINATOR")]]
    """discriminator.pth."""
    output: Output
    """Model folder to write."""
    memory: Literal["matrix", "queue"]
    """Whether the in-painting block's memory was trained as a matrix or a queue; the files do not say."""
    decoder_memory: Literal["patch", "subpatch"]
    """`subpatch` for the released configuration's decoder_memory 'V1', `patch` for 'V3'."""
    topk: int = 5
    """The released configuration's shrink_thres."""
    threshold: Literal["inclusive", "exclusive"] = "exclusive"
    """The released code keeps the items strictly above the k-th."""
    merge_levels: int = 2
    """Up blocks that work on the merged map."""
    dropout: float = 0.0
    """Dropout rate of the feed-forward part, for further training."""
    rho: float = 1.0
    """Probability of the masked shortcut, for further training; SQUID: 0.95."""
    calibrate: Annotated[pathlib.Path | None, arg(metavar="DATA")] = None
    """Training images to calibrate the model on, in any form `train` takes."""
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)

    def run(self) -> int:
        """Convert, save, and calibrate where images are given."""
        from simsid.models import released

        if (self.output / "model.json").exists():
            raise UsageError(f"{self.output} already holds a model; choose another folder with -o")
        options = ("memory", "decoder_memory", "topk", "threshold", "merge_levels", "dropout", "rho")
        model = released.convert(
            released.read_released(self.generator),
            released.read_released(self.discriminator),
            **{name: getattr(self, name) for name in options},
        )
        model.save(output_folder(self.output))
        config = model.config
        print(
            f"{self.output}: {config.image_size} pixels, {config.patches} x {config.patches} patches, "
            f"width {config.width}, {config.levels} levels, {config.items} and {config.decoder_items} items"
        )
        if self.calibrate is None:
            print(f"scores need a calibration: simsid calibrate {self.output} FOLDER")
            return 0
        return Calibrate(str(self.output), self.calibrate, machine=self.machine).run()
