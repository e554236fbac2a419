"""Evaluations, examples and rows with names that attack the page, for the tests of the reports."""

from html.parser import HTMLParser

import numpy as np
import torch

from simsid.evaluation import Evaluation
from simsid.models import MemoryContents
from simsid.report import Example, FilmRow, MemoryViews, page_name, write_report
from simsid.report.memory import Neighbors

HOSTILE = '<script src="http://evil.example/x.js">alert(1)</script>&"\'$x_$.png'
SIGNALS = ("local_residual", "residual", "discriminator_running")


class Page(HTMLParser):
    """Collects what a browser would load and show."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loaded, self.links, self.images, self.shown = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.loaded += [attributes[name] for name in ("src", "srcset", "data") if name in attributes]
        self.links += [attributes["href"]] if "href" in attributes else []
        if tag == "img":
            self.images.append(attributes)
        assert not [name for name in attributes if name.startswith("on") or name == "style"], attributes

    def handle_data(self, data):
        if self.tags[-1:] == ["wbr"]:  # a possible line break inside a word
            self.shown[-1] += data
        elif self.tags[-1:] not in (["script"], ["style"]):
            self.shown.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.shown).split())


def evaluation(kinds=("missing", HOSTILE), held_out=40, in_sample=False, names=SIGNALS):
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], [40, 30])
    findings = ["NORMAL"] * 40 + [kinds[i % len(kinds)] for i in range(30)]
    signals = {name: generator.normal(size=70) + index * labels for index, name in enumerate(names)}
    holdout = {name: generator.normal(size=held_out) for name in names} if held_out else None
    if in_sample:
        holdout = {name: scores[labels == 0] for name, scores in signals.items()}
    return Evaluation(labels, findings, [f"{i}.png" for i in range(70)], signals, "residual", holdout)


def examples(count=3, shape=(24, 20)):
    generator = np.random.default_rng(1)
    return [
        Example(
            path=f"patients/{HOSTILE}" if i == 0 else f"patients/{i}.png",
            finding=HOSTILE if i == 0 else "missing",
            label=(1, 0, None)[i % 3],
            score=0.5 * i,
            input=generator.uniform(-1, 1, shape).astype(np.float32),
            reconstruction=generator.uniform(-1, 1, shape).astype(np.float32),
            heat_map=generator.exponential(size=shape).astype(np.float32),
            details={"window": "center 2048, width 4096", HOSTILE: HOSTILE},
        )
        for i in range(count)
    ]


def rows(count=12, pages=0):
    """Return rows in no order; the last is a file that could not be scored, the first has hostile names."""
    generator = np.random.default_rng(2)
    paths = [f"patients/{HOSTILE if i == 0 else f'{i}.png'}" for i in range(count)]
    scored = [
        FilmRow(
            path=path,
            finding=HOSTILE if i == 0 else ("effusion", "")[i % 2],
            label=(1, 0, None)[i % 3],
            score=round(float(score), 4),
            percentile=100 * float(score),
            flagged=bool(score > 0.8),
            signals={name: float(value) for name, value in zip(SIGNALS, generator.normal(size=3))},
            page=page_name(path) if i < pages else None,
        )
        for i, (path, score) in enumerate(zip(paths[:-1], generator.uniform(size=count)))
    ]
    return [*scored, FilmRow(paths[-1], reason=f"the file is cut short {HOSTILE}")]


def memory():
    """Return the views of a small memory with decoded items, and neighbors of two images."""
    generator = torch.Generator().manual_seed(3)
    uses = torch.randint(0, 9, (4, 5), generator=generator)
    uses[0, :3] = 0
    items, queries = torch.randn(4, 5, 8, generator=generator), torch.randn(6, 4, 8, generator=generator)
    decoded = torch.rand(4, 24, 24, generator=generator) * 2 - 1
    decoded[3, :12, :12] = torch.nan
    latest = queries.transpose(0, 1)
    contents = MemoryContents(
        "in-painting memory", "learned items", items, queries, uses, uses.double(), 20, 2, latest, decoded
    )
    near = [(f"{i}{HOSTILE}", examples()[i].input) for i in range(3)]
    return MemoryViews([contents], neighbors=[Neighbors(HOSTILE, examples()[0].input, near)] * 2)


def write(path, **changes):
    arguments = {
        "title": f"Report {HOSTILE}",
        "evaluation": None,
        "examples": [],
        "configuration": {"model": {"width": 8, HOSTILE: HOSTILE}, HOSTILE: {}},
        "versions": {"simsid": "0.1.0", HOSTILE: HOSTILE},
        "notes": [HOSTILE],
    }
    write_report(path, **{**arguments, **changes})
    return path.read_text("utf-8")
