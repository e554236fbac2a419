"""`simsid models`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Models:
    """List the fitted models that come with simsid, which score and evaluate take by name."""

    def run(self) -> int:
        """Print name, kind, size and what each was fitted to."""
        from simsid import checkpoint
        from simsid.models.loading import SHIPPED, shipped_models

        for name in shipped_models():
            folder = SHIPPED / name
            document = checkpoint.read_json(folder / "model.json")
            megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
            (about, *_) = (folder / "NOTICE").read_text("utf-8").splitlines()
            print(f"{name}  {document['kind']}, {megabytes:.1f} MB. {about}")
            print(f"{'':<{len(name)}}  simsid score {name} FOLDER -o DIR")
        return 0
