"""What the pages say against the code: names, links, figures."""

import re

import documents
import numpy as np
import pytest

import simsid
from simsid import config
from simsid.commands.main import COMMANDS
from simsid.evaluation import Evaluation, format_table
from simsid.models import MAPS, SIGNALS, presets
from simsid.models.signals import decoder_memory_map

LINK = re.compile(r"\[[^\]]*\]\((?!http)([^)#]*)(?:#([\w-]+))?\)")


def quoted(text):
    return set(re.findall(r"`(\w+)`", text))


def test_install_begins_with_the_two_commands_and_ci_takes_the_second_from_there():
    first, second = (
        "pip install -c constraints.txt . && simsid demo",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    )
    install = documents.README.split("## Install")[1]
    assert re.findall(r"```bash\n(.*?)```", install, re.S)[:2] == [f"{first}\n", f"{second}\n"]
    assert documents.README.count(second) == 1
    assert second.split(" && ")[0] in (documents.ROOT / ".ci/run").read_text("utf-8")


def test_readme_is_short_and_has_its_sections_in_order():
    assert len(documents.README.splitlines()) <= 160
    assert re.findall(r"^## (.*)", documents.README, re.M) == [
        "Install",
        "Command line",
        "Python",
        "Results",
        "Kernels",
        "Documentation",
        "Differences from the papers",
        "Contributing, citation, license",
    ]
    assert documents.README.index("research use only") < documents.README.index("## Install")


def test_table_of_the_readme_is_what_the_demo_prints():
    (shown,) = documents.blocks("README.md", "text")
    signals = simsid.Model(config.Config.digit_anatomy()).signal_names
    labels = np.repeat([0, 1], 4)
    values = {name: np.arange(8.0) for name in signals}
    kinds = ["", "", "", "", "flipped", "misordered", "missing", "zero"]
    evaluation = Evaluation(
        labels, kinds, [""] * 8, values, "focal_residual", {name: np.full(20, 0.5) for name in signals}
    )
    printed = format_table(evaluation).splitlines()
    lines = shown.splitlines()
    assert lines[0].split() == printed[0].split() and lines[-2:] == printed[-2:]
    assert [line.split()[0] for line in lines[2:-2] if line[0] != " "] == list(evaluation.signals)
    assert [line.split()[0] for line in lines[3:7]] == evaluation.kinds


def test_quickstart_lists_every_command():
    named = {re.match(r"`simsid (\w+)", row[0])[1] for row in documents.table("docs/quickstart.md", "command")}
    assert named == set(COMMANDS)


def test_scoring_lists_every_signal_and_explain_every_map():
    named = set().union(*(quoted(row[0]) for row in documents.table("docs/scoring.md", "signal")))
    assert named == set(SIGNALS)
    mapped = set().union(*(quoted(row[0]) for row in documents.table("docs/explain.md", "signal")))
    assert mapped == {name for name in MAPS if not name.startswith("decoder_memory")} | {
        decoder_memory_map(level) for level in (1, 2)
    }


def test_explain_says_of_every_map_whether_it_claims_to_localize():
    for names, _, claim in documents.table("docs/explain.md", "signal"):
        assert {MAPS[name].localizes for name in quoted(names)} == {claim.startswith("yes")}, names


def test_training_lists_every_preset_and_ablation():
    named = set().union(*(quoted(row[0]) for row in documents.table("docs/training.md", "preset")))
    assert named == set(presets.PRESETS)
    listed = re.search(r"^Ablations: (.*?)\n\n", documents.PAGES["docs/training.md"], re.S | re.M)[1]
    assert quoted(listed) == set(config.ABLATIONS)


@pytest.mark.parametrize("page", documents.PAGES)
def test_links_of_a_page_lead_somewhere(page):
    folder = (documents.ROOT / page).parent
    for path, anchor in LINK.findall(documents.PAGES[page]):
        target = folder / path if path else documents.ROOT / page
        assert target.exists(), path
        if anchor:
            heads = re.findall(r"^#+ (.*)", target.read_text("utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, anchor


def test_readme_links_to_every_page():
    linked = {path for path, _ in LINK.findall(documents.README)}
    assert {page for page in documents.PAGES if page.startswith("docs/")} <= linked


def test_figures_of_the_readme_stand_in_the_results():
    results = documents.PAGES["docs/results.md"]
    figures = {figure for row in documents.table("README.md", "method") for figure in re.findall(r"0\.\d{3}", row[1])}
    assert len(figures) > 10
    assert not {figure for figure in figures if figure not in results}


def test_citation_names_this_version_and_both_papers():
    citation = (documents.ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {simsid.__version__}\n" in citation
    for paper in ("2403.08689", "2111.13495"):
        assert f"https://arxiv.org/abs/{paper}" in citation and paper in documents.README


def test_types_are_announced_to_users():
    assert (documents.ROOT / "simsid" / "py.typed").is_file()
    assert '"simsid": ["py.typed",' in (documents.ROOT / "setup.py").read_text("utf-8")
