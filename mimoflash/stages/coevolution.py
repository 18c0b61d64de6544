"""Co-evolution: the student becomes its own teachers' start, round by round (arXiv 2601.02780, section 4.3)."""

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mimoflash.run_folder import Say, TrainingRun, write_json
from mimoflash.stages.evaluation import play_held_out
from mimoflash.stages.post_training import distilled, engine_of, taught

VALIDATION_TASKS = 200  # of each domain: held-out ones behind those that `evaluate` asks


@dataclass(frozen=True)
class Scored:
    """A model's rewards by domain, task by task: of several answers to one the mean, since they stand together."""

    model: Path
    rewards: dict[str, list[float]]

    @property
    def mean(self) -> float:
        return mean(mean(rewards) for rewards in self.rewards.values())


def coevolve(this: TrainingRun, rounds: int, say: Say) -> dict[str, Any]:
    """At most `rounds` of: the newest student learns each domain by reinforcement, and one student is distilled from
    these teachers again. Ends with the first round whose student is not better than the one before by more than the
    standard error of the difference. Returns what is in coevolve/done.json: mean rewards by round, and the best model's
    folder. Raises ValueError where the run has not come to its student."""
    best = _score(this, this.done("mopd") / "model")
    say(f"  student: mean reward {best.mean:.3f}")
    history = [best.mean]
    for number in range(1, rounds + 1):
        folder = this.out / "coevolve" / f"round-{number}"
        assert this.recipe.teachers is not None
        for name in this.recipe.teachers:
            taught(this, folder / "teachers" / name, name, best.model, say, round=number)
        distilled(this, folder / "mopd", folder / "teachers", best.model, say, round=number)
        new = _score(this, folder / "mopd" / "model")
        gain, error = _gain(best, new)
        say(f"  round {number}: mean reward {new.mean:.3f}, gained {gain:+.3f} (standard error {error:.3f})")
        history.append(new.mean)
        if gain <= error:
            break
        best = new
    result = {"mean_reward": history, "best": str(best.model.relative_to(this.out))}
    write_json(this.out / "coevolve" / "done.json", result)
    return result


def _gain(before: Scored, after: Scored) -> tuple[float, float]:
    """Of the mean over domains, and its standard error, task by task."""
    pairs = [(before.rewards[name], after.rewards[name]) for name in after.rewards]
    differences = [[new - old for old, new in zip(*pair, strict=True)] for pair in pairs]
    variance = sum(stdev(each) ** 2 / len(each) for each in differences)
    return mean(map(mean, differences)), sqrt(variance) / len(differences)


def _score(this: TrainingRun, model: Path) -> Scored:
    engine, domains = engine_of(this, model), this.recipe.domains()
    asked, samples = this.recipe.evaluate.tasks, this.recipe.evaluate.samples
    rewards = {}
    for name in this.recipe.teachers or {}:
        rollouts = play_held_out(this, engine, name, domains[name], behind=asked, tasks=VALIDATION_TASKS)
        played = [rollout.reward for rollout in rollouts]
        rewards[name] = [mean(played[at : at + samples]) for at in range(0, len(played), samples)]
    return Scored(model, rewards)
