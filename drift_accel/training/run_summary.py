"""The head of a run's RUN.md: what is trained, with what, in words."""

from collections.abc import Mapping
from typing import Any


def run_summary(configuration: Mapping[str, Any], session: Mapping[str, Any], identity: Mapping[str, str]) -> str:
    """A few lines of Markdown from the resolved configuration, the first start's provenance and the hashes of its inputs."""
    lines = [f"**What**: {_what(configuration)}", f"**Data**: {_data(configuration['data'])}"]
    encoders = _encoders(configuration)
    if encoders:
        lines.append(f"**Encoder**: {encoders}")
    lines.append(f"**How**: {_how(configuration)}")
    devices = session.get("devices") or []
    shown = f"{len(devices)} x {devices[0]}" if devices else f"a processor with {session.get('num_cpus')} cores"
    git = session.get("git")
    state = "no git checkout" if git is None else f"commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}"
    versions = session.get("versions") or {}
    lines.append(
        f"**On**: {session.get('hostname')}, {shown}; drift_accel {session.get('package_version')} ({state}, files "
        f"{str(session.get('package_hash'))[:12]}), torch {versions.get('torch')}, accelerate {versions.get('accelerate')}"
    )
    if identity:
        lines.append("**Inputs**: " + ", ".join(f"{name} {value[:12]}" for name, value in sorted(identity.items())))
    lines.append("Everything in full: `config.yaml`, `provenance.json`. The diary below has a line for each start and each end.")
    return "\n\n".join(lines)


def _what(configuration: Mapping[str, Any]) -> str:
    steps = f"{configuration['steps']:,} steps"
    if "generator" in configuration:
        batch = configuration["batch"]
        return (
            f"a one-step generator ({_model(configuration['generator'])}), {steps} of {batch['labels']} labels with "
            f"{batch['generated']} "
            f"generated, {batch['positives']} real and {batch['negatives']} unconditional samples each"
        )
    return f"a masked autoencoder ({_model(configuration.get('mae', {}))}), {steps} of {configuration.get('batch_size')} images"


def _model(settings: Mapping[str, Any]) -> str:
    given = [f"{name} {value}" for name, value in settings.items() if value is not None and name != "preset"]
    return ", ".join([settings.get("preset") or "no preset", *given])


def _data(settings: Mapping[str, Any]) -> str:
    text = "scikit-learn's digits" if settings.get("source") == "digits" else f"{settings.get('source')} {settings.get('path')}"
    images = settings.get("images") if settings.get("source") == "images" else None
    if images:
        how = f"encoded on line by the VAE {images['vae']} ({images['dtype']})" if images.get("vae") else "as pixels"
        text += f", random crops of {images['image_size']}x{images['image_size']}, {how}"
    return text + (f", {settings['max_rows']} rows of it" if settings.get("max_rows") else "")


def _encoders(configuration: Mapping[str, Any]) -> str:
    entries = [configuration["encoder"], *configuration.get("more_encoders", ())] if configuration.get("encoder") else []
    return "; ".join(f"{entry.get('kind', 'mae')} {entry.get('path')}" for entry in entries)


def _how(configuration: Mapping[str, Any]) -> str:
    optimizer = configuration["optimizer"]
    text = (
        f"AdamW with rate {optimizer['lr']:g} after {optimizer['warmup_steps']:,} steps of warm-up, decay "
        f"{optimizer['weight_decay']:g}, "
        f"{configuration['precision']}, averages {', '.join(map(str, configuration['ema']['decays']))}, seed "
        f"{configuration['seed']}"
    )
    if "guidance" in configuration:
        guidance, drift = configuration["guidance"], configuration["drift"]
        text += (
            f"; guidance {guidance['mode']} in [{guidance['minimum']:g}, {guidance['maximum']:g}], temperatures "
            f"{', '.join(map(str, drift['temperatures']))}, statistics {configuration['statistics']}"
        )
        if configuration.get("positives", {}).get("choice", "random") != "random":
            text += f", {configuration['positives']['choice']} positives"
    return text
