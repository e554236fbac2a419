"""Archives of many files for the tests of scoring, and the table that scoring them must give."""

import itertools
import os
from unittest import mock

import tiny

from simsid.distributed import ProcessGroup
from simsid.scoring import archive, score_archive, score_files

TWO = [ProcessGroup(0, 2), ProcessGroup(1, 2)]


def fill(folder, count, kinds=("0", "1", "2", "damaged"), each=500):
    """Write `count` files as links to a few, `each` in a folder, quickly."""
    sources = folder.parent / f"{folder.name} sources"
    sources.mkdir()
    for i, kind in enumerate(kinds):
        if kind == "damaged":
            tiny.damaged(sources, kind)
        else:
            tiny.film(sources / kind, i)
    for i in range(count):
        if i % each == 0:
            (folder / f"{i // each:03d}").mkdir(parents=True)
        os.link(sources / kinds[i % len(kinds)], folder / f"{i // each:03d}" / f"film {i:06d}.png")
    return folder


def expected_table(model, folder, batch_size=16):
    """The bytes of scores.csv, put together without `score_archive`."""
    names = model.signal_names
    lines = [",".join(["path", "label", "finding", "score", "flagged", *names, "reason"])]
    known = {}
    for path in sorted(folder.rglob("*.png")):
        inode = path.stat().st_ino
        if inode not in known:
            (known[inode],) = score_files(model, [path], batch_size=batch_size)
        score = known[inode]
        values = ["" if score.reason else repr(score.signals[name]) for name in names]
        first = ["", ""] if score.reason else [repr(score.score), str(int(score.flagged))]
        lines.append(",".join([str(path), "", "", *first, *values, score.reason]))
    return ("\n".join(lines) + "\n").encode()


def score(model, data, output, group=None, stop=None, **options):
    """Call `score_archive` with one thread; `stop`: with Ctrl-C after so many files. Returns the summary."""
    real = archive.score_files

    def interrupted(*arguments, **settings):
        yield from itertools.islice(real(*arguments, **settings), stop)
        raise KeyboardInterrupt

    with mock.patch.object(archive, "score_files", real if stop is None else interrupted):
        return score_archive(model, data, output, group=group, workers=1, **options)


def rows(output):
    return (output / "scores.csv").read_text().splitlines()[1:]
