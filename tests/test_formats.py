"""What other tools read of an evaluation, worked out by hand from one document."""

import json
import math
import re

import pytest
import yaml

from pipelines.config import Config, load
from pipelines.formats import flat_name, flatten, to_latex, to_markdown, to_mteb, write_formats


def system(label, values, interval=None, p_holm=None):
    of_all = {"queries": 67, "nDCG@10": values[0], "MdR": values[1]}
    found = {"kind": "late interaction", "label": label, "measures": {"all": of_all, "speech": {"queries": 9}}}
    found["intervals"] = {"all": {"nDCG@10": interval}} if interval else {}
    if p_holm is not None:
        found["against"] = {"nDCG@10": {"difference": -0.1, "p": p_holm / 2, "p_holm": p_holm}}
    return found


@pytest.fixture
def document():
    measures = {
        "all": {"queries": 67, "nDCG@10": 0.79, "MdR": 2.0},
        "speech": {"queries": 9, "nDCG@10": 1.0, "MdR": 1.0},
    }
    primary = system("sum of MaxSim", (0.79, 2.0), [0.741, 0.8351]) | {"measures": measures}
    return {
        "schema": "maxreel-evaluation/1",
        "system": "sum_maxsim",
        "release_id": 3,
        "index_id": None,
        "created": "2026-11-21T10:00:00+00:00",
        "depth": 100,
        "primary_measure": "nDCG@10",
        "measures": measures,
        "intervals": primary["intervals"],
        "systems": {
            "sum_maxsim": primary,
            "rrf": system("RRF, k=60", (0.7903, 1.5), [0.74, 0.84], p_holm=0.6),
            "only:speech": system("only speech_*", (0.21, 30.0), [0.1, 0.3], p_holm=0.05),
        },
        "overlap@10 with exact": 0.95,
        "cost": {"videos": 35, "p50_seconds": 0.0125},
    }


def test_the_markdown_table_shows_best_interval_and_significance(document):
    assert to_markdown(document) == (
        "| system | nDCG@10 | MdR |\n"
        "| --- | ---: | ---: |\n"
        "| sum of MaxSim | **0.790** [0.741, 0.835] | 2.000 |\n"
        "| RRF, k=60 | **0.790** [0.740, 0.840] | **1.500** |\n"
        "| only speech\\_\\* | 0.210† [0.100, 0.300] | 30.000 |\n"
        "\n"
        "67 queries. Best in bold, 95 % bootstrap intervals in brackets. "
        "† differs from sum of MaxSim: paired randomisation, Holm over systems, p ≤ 0.05.\n"
    )


def test_the_latex_table_is_of_booktabs_and_escaped(document):
    assert to_latex(document) == (
        "\\begin{table}\n"
        "  \\centering\n"
        "  \\caption{67 queries. Best in bold, 95 \\% bootstrap intervals in brackets. $^{\\dagger}$ differs from "
        "sum of MaxSim: paired randomisation, Holm over systems, p $\\leq$ 0.05.}\n"
        "  \\begin{tabular}{lrr}\n"
        "    \\toprule\n"
        "    system & nDCG@10 & MdR \\\\\n"
        "    \\midrule\n"
        "    sum of MaxSim & \\textbf{0.790}{\\scriptsize [0.741, 0.835]} & 2.000 \\\\\n"
        "    RRF, k=60 & \\textbf{0.790}{\\scriptsize [0.740, 0.840]} & \\textbf{1.500} \\\\\n"
        "    only speech\\_{*} & 0.210$^{\\dagger}${\\scriptsize [0.100, 0.300]} & 30.000 \\\\\n"
        "    \\bottomrule\n"
        "  \\end{tabular}\n"
        "\\end{table}\n"
    )


def test_what_means_something_to_latex_or_markdown_is_escaped_in_labels(document):
    document["systems"]["rrf"]["label"] = "[a|b]\n& 50 % of $x_1^2$ {\\y} ~#1 <z>"
    assert (
        r"    {[}a\textbar{}b{]} \& 50 \% of \$x\_1\textasciicircum{}2\$ \{\textbackslash{}y\} \textasciitilde{}\#1 "
        r"\textless{}z\textgreater{} & " in to_latex(document)
    )
    assert r"| \[a\|b\] & 50 % of $x\_1^2$ {\\y} ~#1 \<z\> |" in to_markdown(document)


@pytest.mark.parametrize("lacking", [{}, {"MdR": math.nan}])
def test_a_measure_that_a_system_lacks_is_a_dash_and_never_best(document, lacking):
    del document["systems"]["rrf"]["measures"]["all"]["MdR"]
    document["systems"]["rrf"]["measures"]["all"] |= lacking
    assert "systems/rrf/mdr" not in flatten(document)
    assert "| RRF, k=60 | **0.790** [0.740, 0.840] | – |\n" in to_markdown(document)
    assert "| **2.000** |\n" in to_markdown(document)
    assert r"{\scriptsize [0.740, 0.840]} & -- \\" in to_latex(document)


def test_a_measure_that_no_system_has_is_a_column_of_dashes(document):
    for of in document["systems"].values():
        of["measures"]["all"]["PRRecall@5"] = math.nan
    assert to_markdown(document).count(" | – |\n") == 3
    [scores] = to_mteb(document, "cacm")["scores"]["test"]
    assert "mdr" in scores and "prrecall_at_5" not in scores


@pytest.mark.parametrize(
    ("measure", "name"),
    [
        ("nDCG@10", "ndcg_at_10"),
        ("AP@100", "map_at_100"),
        ("R@5", "recall_at_5"),
        ("P@1", "precision_at_1"),
        ("RR", "mrr"),
        ("Success@5", "hit_rate_at_5"),
        ("Rprec", "rprec"),
        ("Judged@10", "judged_at_10"),
        ("nDCG(dcg='exp-log2')@10", "ndcg_dcg_exp_log2_at_10"),
        ("AP(rel=2)", "map_rel_2"),
        ("overlap@10 with exact", "overlap_at_10_with_exact"),
        ("screen_text", "screen_text"),
    ],
)
def test_measures_have_the_names_of_mteb(measure, name):
    assert flat_name(measure) == name


def test_flattening_names_every_figure_once_as_trackers_allow(document):
    assert flatten(document) == {
        "queries": 67,
        "ndcg_at_10": 0.79,
        "mdr": 2.0,
        "speech/queries": 9,
        "speech/ndcg_at_10": 1.0,
        "speech/mdr": 1.0,
        "systems/rrf/queries": 67,
        "systems/rrf/ndcg_at_10": 0.7903,
        "systems/rrf/mdr": 1.5,
        "systems/rrf/speech/queries": 9,
        "systems/only_speech/queries": 67,
        "systems/only_speech/ndcg_at_10": 0.21,
        "systems/only_speech/mdr": 30.0,
        "systems/only_speech/speech/queries": 9,
        "overlap_at_10_with_exact": 0.95,
        "cost/videos": 35,
        "cost/p50_seconds": 0.0125,
    }
    assert all(re.fullmatch(r"[/\w.\- ]+", name) for name in flatten(document)), "MLflow's rule"


def test_the_mteb_result_holds_the_primary_system(document):
    assert to_mteb(document, "cacm", ["eng-Latn"]) == {
        "dataset_revision": "local",
        "task_name": "cacm",
        "mteb_version": None,
        "scores": {
            "test": [
                {
                    "ndcg_at_10": 0.79,
                    "mdr": 2.0,
                    "main_score": 0.79,
                    "hf_subset": "default",
                    "languages": ["eng-Latn"],
                }
            ]
        },
        "evaluation_time": None,
        "kg_co2_emissions": None,
        "date": 1795255200.0,
    }


def test_an_evaluation_folder_gets_all_forms_and_its_params_configure_the_same_run(document, tmp_path):
    folder = tmp_path / "cacm"
    folder.mkdir()
    config = load([], ["encode.encoder=lexical", "search.groups=[[frame, metadata], [speech]]"], "./störe")
    write_formats(folder, document, config.model_dump(mode="json"))
    assert json.loads((folder / "mteb.json").read_text()) == to_mteb(document, "cacm")
    assert (folder / "tables.md").read_text() == to_markdown(document)
    assert (folder / "tables.tex").read_text() == to_latex(document)
    assert load([folder / "params.yaml"], []) == config != Config()
    assert yaml.safe_load((folder / "params.yaml").read_text())["store"] == "./störe"
