"""report.html from folders that look like runs, whole, broken off, and with texts that mean harm."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimoflash.report import duration, short, write_report

HARM = "</pre></svg><script>alert('x')</script><img src=x onerror=alert(1)> \ud800"
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Tags, ids, references and the text of a page; fails where tags do not close in order."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.source = file.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "xlink:href", "src"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_metrics(folder: Path, *, steps: int, rows: int, first: float, last: float, layers: int) -> None:
    random = np.random.default_rng(steps)
    lines: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        part = step / steps
        loss = last + (first - last) * math.exp(-6 * part) + random.normal(0, 0.06)
        lines.append(
            {"step": step, "tokens": step * rows, "loss": loss}
            | {f"mtp_loss_{k}": loss + 0.35 * k + random.normal(0, 0.05) for k in range(1, layers + 1)}
            | {"balance_loss": 4.02, "num_zeros": float(random.poisson(90_000 * math.exp(-4 * part)))}
            | {"grad_norm": 0.6 + 3 * math.exp(-20 * part) + random.gamma(1, 0.15)}
            | {"expert_imbalance": 1.15 + 2 * math.exp(-9 * part) + random.gamma(1, 0.06)}
            | {"lr": 3e-3 * min(1, 10 * part) * (0.55 + 0.45 * math.cos(math.pi * part))}
            | {"tokens_per_second": 9_400 + random.normal(0, 400), "mfu": 0.44 + random.normal(0, 0.02)}
        )
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def training(loss: float, layers: int) -> dict[str, Any]:
    sources = {"python": 0.0, "arithmetic": -0.9, "maze": -0.7, "tools": -1.4}
    return {
        "steps": 300, "tokens": 2_457_600, "seconds": 260.0, "loss": loss,
        "held_out": {
            name: {"loss": loss + more} | {f"mtp_agreement_{k}": 0.8 - k / 7 - more / 9 for k in range(1, layers + 1)}
            for name, more in sources.items()
        },
    }


def conversations() -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function", "function": {"name": "read_depth", "arguments": {"unit": "custom"}}}
    tool = {"type": "function", "function": {"name": "read_depth", "description": "Lake depth.", "parameters": {}}}
    maze = "Go from S to G in at most 5 moves (U, D, L, R).\n  1 2 3 4\na . . S #\nb G . # .\nc # . . #\nd . . # ."
    return [
        {"domain": "arithmetic", "reward": 1.0, "tools": [], "messages": [
            {"role": "user", "content": "What is the sum of 657 and 5?"},
            {"role": "assistant", "content": "662", "reasoning_content": "7+5+0=12\n5+0+1=06\n6+0+0=06"}]},
        {"domain": "maze", "reward": 0.0, "tools": [], "messages": [
            {"role": "user", "content": maze},
            {"role": "assistant", "content": "L D D", "reasoning_content": "S=a3 G=b1\nL a2\nD b2", "tool_calls": []}]},
        {"domain": "tools", "reward": 1.0, "tools": [tool], "messages": [
            {"role": "system", "content": "Answer with the tools."},
            {"role": "user", "content": "Tell me the lake depth, in unit custom."},
            {"role": "assistant", "content": "", "reasoning_content": "Look it up.", "tool_calls": [call]},
            {"role": "tool", "content": '{"depth": 898}', "tool_call_id": "call_1"},
            {"role": "assistant", "content": "The depth of the lake is 898.", "reasoning_content": "It is 898."}]},
    ]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("whole")))


def write_run(folder: Path) -> Path:
    write(folder / "recipe.json", {"name": "demo", "seed": 0, "evaluate": {"tasks": 100}})
    write_metrics(folder / "pretrain", steps=900, rows=4096, first=7.6, last=1.9, layers=1)
    write_metrics(folder / "sft", steps=300, rows=2048, first=1.7, last=0.6, layers=3)
    for stage, loss, layers in (("pretrain", 1.9, 1), ("sft", 1.6, 3)):
        result = training(loss, layers)
        end = {"step": 900, "tokens": 3_686_400} if stage == "pretrain" else {"step": 300, "tokens": 614_400}
        with (folder / stage / "metrics.jsonl").open("a") as log:
            held_out = {f"held_out/{name}": value["loss"] for name, value in result["held_out"].items()}
            log.write(json.dumps(end | held_out) + "\n")
        write(folder / stage / "done.json", {"seconds": 260.0, "training": result})
    domains = {
        "arithmetic": {"chance": 0.0096, "pretrain": 0.12, "sft": 0.93},
        "maze": {"chance": 0.195, "pretrain": 0.2, "sft": 0.61},
        "tools": {"chance": 0.064, "pretrain": 0.0, "sft": 0.88},
    }
    write(folder / "evaluate" / "done.json", {"seconds": 61.0, "domains": domains, "accept_length": 2.71})
    write(folder / "evaluate" / "conversations.json", conversations())
    write(folder / "summary.json", {
        "name": "demo", "seconds": {"tokenizer": 14.2, "pretrain": 392.0, "sft": 126.4, "evaluate": 61.0},
        "machine": {"matmul_gflops": 123.4, "threads": 2, "torch": "2.13.0"},
        "parameters": {"total": 3_412_345, "active": 1_204_567, "mtp": 401_234},
        "tokens": {"pretrain": 3_686_400, "sft": 614_400}, "domains": domains, "accept_length": 2.71,
    })
    return folder


def test_a_whole_run_is_shown_and_the_page_stands_alone(report: Path) -> None:
    assert report.name == "report.html"
    assert not report.with_name("report.html.tmp").exists()
    page = Page(report)
    for expected in (
        "demo", "3.4M parameters", "1.2M active", "4.3M tokens seen", "9.9 min in all", "123 GFLOP/s", "2.71", "44%",
        "Tasks solved", "93%", "20%", "Loss, pretrain", "Loss, sft", "MTP layer 3", "Held-out loss by source", "python",
        "Expert imbalance", "Gradient norm", "Zeros in the gradient", "Conversations", "✓ passed", "✗ not passed",
        "1 tool offered", 'read_depth {"unit": "custom"}', "The depth of the lake is 898.",
    ):
        assert expected in page.text, expected
    assert "script" not in page.tags
    assert all(reference.startswith("#") for reference in page.references)
    assert "has not finished" not in page.text
    assert report.stat().st_size < 1_000_000


def test_ids_are_unique_over_all_plots_and_every_reference_has_its_id(report: Path) -> None:
    page = Page(report)
    assert page.tags.count("svg") >= 8
    assert len(set(page.ids)) == len(page.ids)
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.ids)


def test_plots_take_their_colours_from_the_page(report: Path) -> None:
    source = report.read_text()
    drawn = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}", drawn)
    used = set(re.findall(r"var\((--\w+)\)", source))
    light, dark = source.split("@media (prefers-color-scheme: dark)")
    for variable in used:
        assert f"{variable}:" in light
        assert f"{variable}:" in dark


def test_it_is_the_same_page_each_time(report: Path) -> None:
    before = report.read_bytes()
    assert write_report(report.parent).read_bytes() == before


def test_no_text_of_the_run_becomes_markup(whole: Path) -> None:
    turn = {"role": HARM, "content": HARM, "reasoning_content": HARM}
    call = {"function": {"name": HARM, "arguments": {HARM: HARM}}}
    tool = {"function": {"name": HARM, "description": HARM}}
    harm = {"domain": HARM, "reward": 1.0, "tools": [tool], "messages": [turn | {"tool_calls": [call]}]}
    write(whole / "evaluate" / "conversations.json", [harm])
    recipe = json.loads((whole / "recipe.json").read_text())
    write(whole / "recipe.json", recipe | {"name": HARM})
    plain = "<script>alert('x')"  # a label of a plot is cut to 24 characters
    summary = json.loads((whole / "summary.json").read_text())
    summary["domains"]["$\\frac{$" + plain] = {"chance": 0.1, "sft": 0.4}
    write(whole / "summary.json", summary)
    done = json.loads((whole / "sft" / "done.json").read_text())
    done["training"]["held_out"][plain] = {"loss": 1.0, "mtp_agreement_1": 0.5}
    write(whole / "sft" / "done.json", done)

    page = Page(write_report(whole))
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count("<script>alert('x')</script>") >= 10
    assert page.text.count(plain) > page.text.count(plain + "</script>")


def test_stages_that_have_not_run_are_left_out(whole: Path) -> None:
    for file in ("sft/done.json", "sft/metrics.jsonl", "evaluate/done.json", "evaluate/conversations.json"):
        (whole / file).unlink()
    write(whole / "summary.json", {"name": "demo", "seconds": {"pretrain": 3.0}})
    text = Page(write_report(whole)).text
    assert "Loss, pretrain" in text
    for absent in ("Loss, sft", "fine-tuned", "Tasks solved", "Conversations", "parameters", "when drafting"):
        assert absent not in text, absent


def test_a_stage_broken_off_is_shown_up_to_there(whole: Path) -> None:
    for file in ("pretrain/done.json", "summary.json", "evaluate/done.json", "evaluate/conversations.json"):
        (whole / file).unlink()
    log = whole / "pretrain" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:120]) + '{"step": 121, "tok')
    text = Page(write_report(whole)).text
    assert "The stage pretrain has not finished: what is shown of it ends at step 120" in text
    assert "Loss, pretrain" in text


@pytest.mark.parametrize("broken", [None, "recipe.json", "summary.json", "sft/done.json"])
def test_files_that_are_missing_or_broken_do_not_stop_it(tmp_path: Path, broken: str | None) -> None:
    if broken:
        (tmp_path / broken).parent.mkdir(exist_ok=True)
        (tmp_path / broken).write_text('{"half')
    page = Page(write_report(tmp_path))
    assert tmp_path.name in page.text
    assert "svg" not in page.tags


def test_one_step_and_losses_that_are_not_finite(tmp_path: Path) -> None:
    (tmp_path / "pretrain").mkdir()
    line = {"step": 1, "tokens": 64, "loss": 5.0, "lr": 0.0, "grad_norm": float("nan"), "tokens_per_second": 10.0}
    (tmp_path / "pretrain" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = Page(write_report(tmp_path))
    assert "Loss, pretrain" in page.text
    assert "Gradient norm" not in page.text


def test_later_stages_bring_bars_and_expert_load(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    for rates in summary["domains"].values():
        rates |= {"teacher": 0.97, "student": 0.95}
    summary["domains"]["maze"]["student"] = None  # not measured
    write(whole / "summary.json", summary)
    done = json.loads((whole / "sft" / "done.json").read_text())
    write(whole / "sft" / "done.json", done | {"expert_load": [[120.0, 80.0, 100.0, 100.0], [0.0, 0.0, 0.0, 0.0]]})
    text = Page(write_report(whole)).text
    for expected in ("teacher", "student", "97%", "MoE layer 2"):
        assert expected in text


def test_numbers_are_short() -> None:
    assert [short(n) for n in (7, 950, 4321, 56_789, 3_412_345, 1.5e9)] == ["7", "950", "4.3k", "57k", "3.4M", "1.5B"]
    assert [duration(s) for s in (4.2, 89, 90, 9000, 2e5)] == ["4 s", "89 s", "1.5 min", "2.5 h", "2.3 days"]
