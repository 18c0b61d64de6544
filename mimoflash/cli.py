"""The command line: parses, calls one function, prints."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Make, improve, serve and use a MiMo-V2-Flash kind of language model.", no_args_is_help=True,
    pretty_exceptions_enable=False, add_completion=False,
)
bench_app = typer.Typer(help="Measure beside a peer, in turn, in one run.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Model = Annotated[str, typer.Argument(help="A model folder, a .gguf file, a run's folder, a hub id, or smol.")]
Seed = Annotated[int | None, typer.Option(help="Fixes what is sampled.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]


@contextmanager
def _user_errors() -> Iterator[None]:
    """An error that the user can mend is one line, not a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.secho(f"mimoflash: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.secho("\nmimoflash: interrupted", fg="yellow", err=True)
        raise typer.Exit(130) from None


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Where the run is kept.")] = Path("runs/demo")) -> None:
    """From nothing to a model one can talk to, with a report: about ten minutes on two cores."""
    _run("demo", out, only=None, changes=[], resume=True)
    typer.echo(f"\ntalk to it: mimoflash chat {out}")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's .toml file, or the name of one that comes along.")],
    only: Annotated[str | None, typer.Option(help="Run this stage alone.", metavar="STAGE")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="Change a value, as pretrain.tokens=1000.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the run is kept; runs/NAME if not given.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run that is there.")] = False,
) -> None:
    """Run a recipe's stages: tokenizer, pretrain, sft, evaluate."""
    _run(recipe, out or Path("runs") / Path(recipe).stem, only=only, changes=change or [], resume=resume)


def _run(recipe: str, out: Path, *, only: str | None, changes: list[str], resume: bool) -> None:
    with _user_errors():
        from mimoflash import run as runs
        from mimoflash.recipe import load_recipe

        runs.run(load_recipe(recipe, changes), out, only=only, resume=resume, say=typer.echo)
        typer.echo(f"{out / 'summary.json'}\n{out / 'report.html'}")


@app.command()
def generate(
    model: Model, prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    max_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 64, temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens that hold this much.")] = 1.0,
    seed: Seed = None,
) -> None:
    """Continue a text as it is, without a chat template."""
    with _user_errors():
        from mimoflash.engine import Engine, SamplingParams
        from mimoflash.run import open_model
        from mimoflash.serve.terminal import stream_text

        text = sys.stdin.read() if prompt == "-" else prompt
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        network, tokenizer = open_model(model)
        typer.echo(text, nl=False)
        for piece in stream_text(Engine(network, tokenizer), tokenizer, text, params):
            typer.echo(piece, nl=False)
        typer.echo()


@app.command()
def chat(
    model: Model, thinking: Annotated[bool, typer.Option(help="Let the model reason first.")] = True,
    max_tokens: Annotated[int, typer.Option(help="At most so many tokens an answer.")] = 512,
    temperature: Temperature = 0.8, top_p: Annotated[float, typer.Option(help="As in generate.")] = 0.95,
    seed: Seed = None,
) -> None:
    """Talk to a model. An empty line or Ctrl-D ends it, Ctrl-C stops an answer."""
    with _user_errors():
        from mimoflash.engine import Engine, SamplingParams
        from mimoflash.run import open_model
        from mimoflash.serve.terminal import converse

        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        network, tokenizer = open_model(model)
        converse(Engine(network, tokenizer), tokenizer, params, thinking=thinking)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A model, as for chat.")],
    target: Annotated[Path, typer.Argument(help="The folder or .gguf file to write.")],
    format: Annotated[Literal["hf", "gguf"], typer.Option(help="Published safetensors, or GGUF for llama.cpp.")] = "hf",
    dtype: Annotated[Literal["fp8", "bf16", "float32"], typer.Option(help="Of the weights.")] = "bf16",
) -> None:
    """Write a model in another format."""
    with _user_errors():
        from mimoflash import run as runs

        runs.convert(source, target, format=format, dtype=dtype)
        typer.echo(str(target))


@bench_app.command("train")
def bench_train(
    peer: Annotated[Literal["transformers"] | None, typer.Option(help="Run this beside ours, in turn.")] = None,
    shape: Annotated[str, typer.Option(help="nano, small, or a config.json.")] = "nano",
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    pairs: Annotated[int, typer.Option(help="Times each side runs.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """Training steps: tokens a second, share of the matmul peak, and the ratio to the peer."""
    with _user_errors():
        from mimoflash.benchmarks.training import bench_training

        bench_training(shape, peer=peer, batch=batch, length=length, pairs=pairs, json_file=json_file, say=typer.echo)


if __name__ == "__main__":
    app()
