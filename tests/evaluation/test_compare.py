import json

import pytest

from mm import cli
from mm.evaluation.compare import compare
from mm.evaluation.runner import evaluate

from .toys import ColorBenchmark, Seer


class Blind(Seer):
    def _answer(self, sample):
        return "red"


@pytest.fixture
def runs(tmp_path):
    for name, seer in (("a", Blind()), ("b", Seer())):
        evaluate(
            None,
            ColorBenchmark(),
            output=tmp_path / name / "results",
            respond=seer,
            show_progress=False,
            seed=ord(name),
        )
    return tmp_path / "a", tmp_path / "b"


def test_compare(runs):
    [found] = compare(*runs)
    assert (found.benchmark, found.n) == ("colors", 13)
    assert (found.a, found.b) == (pytest.approx(3 / 13), 1.0)
    assert (found.paired.a_better, found.paired.b_better) == (0, 10)
    assert found.paired.p_value == pytest.approx(2 / 2**10)
    assert found.paired.low > 0
    assert found.differences == {"seed": (97, 98)}
    [back] = compare(runs[1], runs[0])
    assert back.paired.difference == -found.paired.difference and back.paired.p_value == found.paired.p_value


def test_command(runs, capsys):
    assert cli.main(["compare", str(runs[0]), str(runs[1] / "results" / "colors.json"), "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    assert told["paired"]["b_better"] == 10
    assert cli.main(["compare", *map(str, runs), "--benchmark", "colors"]) == 0
    out = capsys.readouterr().out
    assert "McNemar" in out and "seed differs: 97 and 98" in out


def edit(run, change):
    file = run / "results" / "colors.predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.pop(), "no prediction for 'plain'"),
        (lambda lines: lines[0].update(answers=["pink"]), "'q0' is another question, or has other answers"),
        (lambda lines: lines.append(lines[0]), "line 14: the id 'q0' appears twice"),
        (lambda lines: lines[0].pop("score") and lines[0].update(score=None), "'q0' has no score"),
        (lambda lines: lines[0].update(surprise=1), "line 1: not a line of predictions"),
    ],
)
def test_what_cannot_be_compared_is_named(runs, change, message):
    edit(runs[1], change)
    with pytest.raises(ValueError, match=message):
        compare(*runs)


def test_missing_runs_and_benchmarks_are_named(runs, tmp_path, capsys):
    with pytest.raises(ValueError, match="no results of an evaluation"):
        compare(runs[0], tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no result of 'mmmu'; there is colors"):
        compare(runs[0], runs[1], ["mmmu"])
    assert cli.main(["compare", str(runs[0]), str(tmp_path / "c")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
