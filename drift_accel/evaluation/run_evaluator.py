"""One setting of a run to one result file: what sweeps, the watcher and the bundle call again and again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from drift_accel.data.latent_export import Workers
from drift_accel.evaluation.evaluate import MetricConfig, describe_reference, discard, evaluate_pictures, plan_metrics
from drift_accel.evaluation.feature_network import FeatureNetwork
from drift_accel.evaluation.results import write_result
from drift_accel.evaluation.statistics import ReferenceStatistics
from drift_accel.evaluation.sweeps import Point
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import plain_value
from drift_accel.sampling.class_choice import choose_labels
from drift_accel.sampling.outputs import write_npz
from drift_accel.sampling.pictures import GeneratedPictures, sample_labels
from drift_accel.sampling.sample_store import SampleStore
from drift_accel.sampling.trained import TrainedGenerator, load_trained
from drift_accel.sampling.vae_choice import LatentDecoder, open_decoder


@dataclass(kw_only=True)
class RunEvaluator:
    """Evaluates points of one run under one protocol; all processes call it alike."""

    run: RunFolder
    network: FeatureNetwork
    reference: ReferenceStatistics | None
    metrics: MetricConfig
    seed: int = 0
    classes: str | None = None
    """Comma-separated classes; None: all."""
    vae: str | None = None
    """As `open_decoder` takes it."""
    vae_dtype: str = "float32"
    vae_batch: int = 8
    quantizer: str | None = None
    """None: the protocol's."""
    device: torch.device | str = "cpu"
    workers: Workers = field(default_factory=Workers)
    command: Sequence[str] = ()
    log: Callable[[str], None] = print
    _loaded: tuple[Any, TrainedGenerator, LatentDecoder | None] | None = None

    def __call__(self, point: Point, num_samples: int, path: Path, *, images: Path | None = None) -> None:
        """Evaluate `num_samples` samples of `point` into the result file `path`; `images` also keeps them as an `.npz`.

        Raises ValueError and OSError as loading, generating and measuring do.
        """
        pictures = self.workers.together(lambda: self._planned(point, num_samples))
        work = self.work_dir(path)
        result = evaluate_pictures(
            pictures,
            self.network,
            work,
            reference=self.reference,
            config=self.metrics,
            model=pictures.trained.origin,
            keep_pixels=images is not None,
            workers=self.workers,
            command=self.command,
            log=self.log,
        )
        if self.workers.is_main:
            if images is not None:
                store = SampleStore(work, pictures, self.network, keep_pixels=True)
                write_npz(store, images, {**pictures.identity(), "model": dict(pictures.trained.origin)})
            write_result(path, result, overwrite=True)
            discard(work)
        self.workers.wait()

    @staticmethod
    def work_dir(path: Path) -> Path:
        """Where the chunks of the result `path` lie until it is written."""
        return path.with_name(f"{path.stem}.in_progress")

    @contextmanager
    def holding(self, point: Point, trained: TrainedGenerator, decoder: LatentDecoder | None) -> Iterator[None]:
        """Within the block `point` is this model, which is in memory, and not one of the run's files."""
        self._loaded = ((point.step, point.ema), trained, decoder)
        try:
            yield
        finally:
            self._loaded = None

    def problems(self, result: Mapping[str, Any]) -> list[str]:
        """Why a result that is there is not one that this evaluator would write, one line a reason; empty if it is."""
        reference = describe_reference(self.reference) or {}
        theirs = result["reference"] or {}
        pairs = {f"protocol, {key}": (result["protocol"].get(key), value) for key, value in self.network.identity().items()}
        pairs |= {f"reference, {key}": (theirs.get(key), reference.get(key)) for key in ("sha256", "features_from")}
        pairs["settings"] = (result.get("settings"), self.metrics.recorded())
        pairs["seed"] = (result["generated"].get("seed"), self.seed)
        pairs["quantiser"] = (result["generated"].get("quantizer"), self.quantizer or self.network.protocol.quantizer)
        pairs = {name: (plain_value(there), plain_value(here)) for name, (there, here) in pairs.items()}
        return [f"{name}: {there!r} there, {here!r} now" for name, (there, here) in pairs.items() if there != here]

    def pictures(self, point: Point, num_samples: int) -> GeneratedPictures:
        """The samples of a point, classes in turn."""
        trained, decoder = self.model(point)
        return GeneratedPictures(
            trained,
            sample_labels(choose_labels(self.classes, trained.table), num_samples),
            guidance_scale=point.guidance_scale,
            seed=self.seed,
            decoder=decoder,
            quantizer=self.quantizer or self.network.protocol.quantizer,
            device=self.device,
        )

    def _planned(self, point: Point, num_samples: int) -> GeneratedPictures:
        """The samples of a point whose metrics can all be computed. Loads files, which may fail on one process alone."""
        pictures = self.pictures(point, num_samples)
        plan_metrics(self.metrics, num_samples, self.network, self.reference)
        return pictures

    def makes_latents_alone(self, point: Point) -> bool:
        """Whether a point's samples cannot be seen: latents without a decoder."""
        trained, decoder = self.model(point)
        return decoder is None and trained.makes_latents

    def model(self, point: Point) -> tuple[TrainedGenerator, LatentDecoder | None]:
        """The generator of a point and its decoder, loaded once for neighbouring points."""
        key = (point.step, point.ema)
        if self._loaded is None or self._loaded[0] != key:
            trained = load_trained(self.run.path, step=point.step, ema=point.ema)
            decoder = self._decoder(trained)
            self._loaded = (key, trained, decoder)
        return self._loaded[1], self._loaded[2]

    def _decoder(self, trained: TrainedGenerator) -> LatentDecoder | None:
        if self.network.protocol.name == "encoder" and self.vae is None:
            return None  # features of latents need no pictures
        return open_decoder(trained, self.vae, dtype=self.vae_dtype, batch=self.vae_batch, device=self.device)
