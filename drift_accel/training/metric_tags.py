"""Every tag that a run writes: what it means, what is healthy, and the order in which TensorBoard shows them.

`python -m drift_accel.training.metric_tags > docs/metrics.md` writes the list for readers.
"""

import re
from dataclasses import dataclass

from drift_accel.drift.couplings import DIAGNOSTICS
from drift_accel.training.alarms import ALARMS

TEMPERATURE = r"_\d[\d.e+-]*"


@dataclass(frozen=True)
class Tag:
    """One tag, or a family: `per_temperature` adds _TAU, `per_key` also exists as NAME/KEY (NAME is the mean over keys), of
    `kinds` there is NAME/NUMBER alone.

    kind: scalar, histogram, image or text; of: which trainer writes it; when: on which condition, "" for always.
    """

    name: str
    group: str
    meaning: str
    healthy: str
    kind: str = "scalar"
    of: str = "both"
    per_temperature: bool = False
    per_key: bool = False
    kinds: bool = False
    when: str = ""

    @property
    def pattern(self) -> str:
        keys = r"/.+" if self.kinds else r"(/.+)?" if self.per_key else ""
        return re.escape(self.name) + (TEMPERATURE if self.per_temperature else "") + keys

    @property
    def title(self) -> str:
        keys = "/NUMBER" if self.kinds else "[/KEY]" if self.per_key else ""
        return self.name + ("_TAU" if self.per_temperature else "") + keys


def _diagnostic(name: str, healthy: str) -> Tag:
    return Tag(name, "Health", DIAGNOSTICS[name], healthy, of="generator", per_temperature=True, per_key=True)


# In the order that matters to somebody who looks at a run for the first time.
TAGS = (
    Tag(
        "drift_sqnorm",
        "Progress",
        "mean squared drift: how far samples are still asked to move",
        "rises in the first steps, then falls for the whole run, at the largest temperature first",
        of="generator",
        per_temperature=True,
        per_key=True,
    ),
    Tag(
        "scale",
        "Progress",
        "mean distance between samples in a key's features, the unit of the temperatures",
        "falls, then flat; never near 0",
        of="generator",
        per_key=True,
    ),
    Tag(
        "diversity_ratio",
        "Progress",
        "deviation of generated samples within a class over that of real ones; 0 before the first step",
        "0.5 to 1.2 after the warm-up; below 0.1 the classes have collapsed",
        of="generator",
        per_key=True,
    ),
    Tag(
        "samples",
        "Progress",
        "pictures of the first average's weights, a row a class",
        "better from grid to grid",
        kind="image",
        of="generator",
        when="pixels of 1 or 3 channels, or sample.vae",
    ),
    Tag(
        "evaluation",
        "Progress",
        "numbers of the run's own evaluation: fid or frechet_PROTOCOL, precision, recall, kid, inception_score; distances of few "
        "samples are larger than those of 50,000. The result files are RUN/evaluation/training_*.json",
        "distances fall, precision and recall rise; after a jump look at the samples",
        of="generator",
        kinds=True,
        when="evaluation.every",
    ),
    Tag("reconstruction", "Progress", "squared error of hidden patches", "falls, steeply at first", of="encoder"),
    Tag(
        "accuracy",
        "Progress",
        "share of samples that the classifier gets right",
        "near chance until classifier_weight rises, then rises",
        of="encoder",
    ),
    Tag(
        "loss",
        "Progress",
        "what is minimised. A generator's is the sum over keys of fields that are normalised to length 1, so it is "
        "nearly constant by design: look at drift_sqnorm",
        "generator: between 3 and 9 a key with three temperatures; encoder: falls",
    ),
    Tag("alarms", "Health", "signs of trouble, one line each", "none", kind="text"),
    _diagnostic(
        "floor_share", "0.8 at 0.02 is normal; at the largest temperature below 0.3, near 1 the drift sees no neighbours"
    ),
    _diagnostic("positive_sample_size", "above 2 and below the number of positives"),
    _diagnostic("negative_sample_size", "above 2 and below generated + negatives"),
    _diagnostic("mean_coefficient", "neither 0 nor jumping"),
    Tag(
        "key_loss",
        "Health",
        "the loss of a key, the mean over its problems",
        "3 to 9 with three temperatures; at most 9",
        of="generator",
        per_key=True,
    ),
    Tag(
        "diversity_generated",
        "Health",
        "deviation of generated features within a class",
        "close to diversity_real",
        of="generator",
        per_key=True,
    ),
    Tag(
        "diversity_real",
        "Health",
        "deviation of real features within a class",
        "flat: it belongs to data and encoder",
        of="generator",
        per_key=True,
    ),
    Tag("guidance_scale", "Health", "mean guidance of a step's labels", "flat, within the configured range", of="generator"),
    Tag(
        "guidance",
        "Health",
        "guidance of the labels of the first process",
        "the configured distribution",
        kind="histogram",
        of="generator",
    ),
    Tag(
        "val",
        "Health",
        "reconstruction and accuracy on held-out images at the mask ratio and with nothing hidden (`_unmasked`), of the raw "
        "weights and each average",
        "at the mask ratio close to the training values, rising while those fall is overfitting; with nothing hidden the "
        "accuracy is higher, and the reconstruction may be poor: no training step asks for visible cells",
        of="encoder",
        kinds=True,
        when="validation.every",
    ),
    Tag("classification", "Health", "cross-entropy of the classifier", "falls once classifier_weight is above 0", of="encoder"),
    Tag(
        "classifier_weight", "Health", "weight of the classifier's loss", "0, then rises to its value near the end", of="encoder"
    ),
    Tag(
        "gradient_norm",
        "Optimiser",
        "length of the gradient before clipping",
        "large at first, then steady; far above optimizer.clip_norm every step is clipped, which the published runs also do",
    ),
    Tag(
        "update_norm",
        "Optimiser",
        "length of what a step adds to the weights",
        "1e-4 to 1e-2 of weight_norm; 0 in the first step of a warm-up from 0 or where the step was skipped",
    ),
    Tag("weight_norm", "Optimiser", "length of all weights", "rises slowly; a jump is trouble"),
    Tag("learning_rate", "Optimiser", "rate of the step", "rises linearly, then constant"),
    Tag("skipped_steps", "Optimiser", "steps that were not finite and changed nothing", "0", when="nonfinite is skip:N"),
    Tag("samples_per_second", "Speed", "generated samples (encoder: images) that the run trains on, all processes", "flat"),
    Tag("steps_per_second", "Speed", "optimiser steps, the time of pictures and evaluations included", "flat but for these"),
    Tag(
        "model_flop_utilisation",
        "Speed",
        "operations that the step's networks need at least (forward and backward, without recomputation, passes for statistics, "
        "drift and optimiser) over what all devices could do in the time that training took; their peak is the makers' dense one "
        "of the run's precision (TF32 where float32 convolutions use it)",
        "flat; a pass for statistics alone takes its time without counting here",
        when="a device whose peak is known, or log.peak_tflops",
    ),
    Tag(
        "data_wait_share",
        "Speed",
        "share of the time that the first process waits for data",
        "below 0.05; above 0.3 the device starves",
    ),
    Tag(
        "memory_gb",
        "Speed",
        "the most that the first process has held of its device's memory, in GB; without a GPU of the machine's",
        "flat after the first steps, 10 % below what the device has",
    ),
    Tag(
        "vae_share",
        "Speed",
        "share of the time that encoding pictures by the VAE takes",
        "below 0.5; export a cache otherwise",
        of="encoder",
        when="pictures that are encoded while training",
    ),
)


# Families whose numbers are of different kinds: no mean is taken over them.
KINDS = tuple(tag.name for tag in TAGS if tag.kinds)


def find_tag(name: str, kind: str = "scalar") -> Tag | None:
    """The entry that a tag of an event file or of metrics.jsonl belongs to; None for one that is not listed."""
    for tag in TAGS:
        if tag.kind == kind and re.fullmatch(tag.pattern, name):
            return tag
    return None


def dashboard(trainer: str) -> dict[str, dict[str, list]]:
    """TensorBoard's layout for "generator" or "encoder": groups of charts, what matters first ("Custom scalars" there)."""
    groups: dict[str, dict[str, list]] = {}
    for tag in TAGS:
        if tag.kind != "scalar" or tag.of not in ("both", trainer):
            continue
        end = "/.*" if tag.kinds else TEMPERATURE if tag.per_temperature else ""
        pattern = f"^{re.escape(tag.name)}{end}$"
        groups.setdefault(f"{len(groups) + 1} {tag.group}" if not _group(groups, tag) else _group(groups, tag), {})[tag.name] = [
            "Multiline", [pattern],
        ]  # fmt: skip
    return groups


def _group(groups: dict[str, dict], tag: Tag) -> str | None:
    return next((name for name in groups if name.endswith(f" {tag.group}")), None)


def markdown() -> str:
    """docs/metrics.md."""
    lines = [
        "# What a run writes",
        "",
        "Scalars stand in `metrics.jsonl` and in TensorBoard (`tensorboard --logdir RUN/tensorboard`; the tab *Custom scalars* "
        "shows the",
        "groups below in this order). `TAU` is a temperature, `/KEY` one feature key, without it the mean over keys; `/NUMBER` "
        "is one of",
        "several. This file is written by `python -m drift_accel.training.metric_tags > docs/metrics.md`.",
        "",
        "A generator's loss is flat by design: every key's field is normalised before it is squared. Progress is "
        "`drift_sqnorm_TAU`,",
        "the length of the field before that, and the pictures.",
    ]
    for group in dict.fromkeys(tag.group for tag in TAGS):
        lines += ["", f"## {group}", "", "| tag | trainer | meaning | healthy |", "|---|---|---|---|"]
        for tag in (tag for tag in TAGS if tag.group == group):
            extra = "" if tag.kind == "scalar" else f" ({tag.kind})"
            when = f" (only with {tag.when})" if tag.when else ""
            cells = (f"`{tag.title}`{extra}", tag.of, tag.meaning + when, tag.healthy)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        "## Alarms",
        "",
        "One line in the log and a text in TensorBoard; `python tools/run_status.py RUN` shows those that last.",
        "",
    ]
    lines += ["| alarm | what is seen | records in a row |", "|---|---|---|"]
    lines += [f"| `{name}` | {meaning} | {count} |" for name, (meaning, count) in ALARMS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
