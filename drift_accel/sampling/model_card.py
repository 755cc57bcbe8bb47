"""The model card of a saved pipeline: what it is, how to use it, where it came from."""

from collections.abc import Mapping
from typing import Any

SHOWN_CLASSES = 10

_TEMPLATE = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- drifting
- one-step
- class-conditional
---

# A one-step image generator, trained by drifting

{kind} of {classes} classes in one network pass ([Generative Modeling via Drifting](https://arxiv.org/abs/2602.04770)),
made with `drift_accel`.

```python
import torch
from drift_accel import DriftPipeline

pipe = DriftPipeline.from_pretrained("PLACE_OF_THIS_FOLDER")
images = pipe(class_labels=[{examples}], guidance_scale=1.0, generator=torch.Generator().manual_seed(0)).images
```

| | |
|---|---|
{rows}

## Classes

{names}

## Where it came from

{origin}

Everything that was recorded lies in `provenance.json`.
"""


def model_card(config: Mapping[str, Any], id2label: Mapping[str, str], provenance: Mapping[str, Any], *, has_vae: bool) -> str:
    """The text of README.md: `config` is the generator's, `id2label` its class names, `provenance` what is saved beside it."""
    side, channels = config["input_size"], config["in_channels"]
    size = f"{channels}x{side}x{side} " + ("latents, decoded by the VAE in this folder" if has_vae else "pixels")
    rows = {
        "generator's output": size,
        "transformer": f"{config['depth']} blocks, width {config['hidden_size']}, {config['num_heads']} heads, "
        f"patches of {config['patch_size']}",
        "style coordinates": f"{config['num_style_tokens']} of {config['style_codebook_size']}",
        "classes": config["num_classes"],
    }
    names = sorted(id2label.items(), key=lambda item: int(item[0]))
    shown = [f"{label}: {name}" for label, name in names[:SHOWN_CLASSES]]
    more = f"\n\nand {len(names) - SHOWN_CLASSES} more, see `pipe.config.id2label`." if len(names) > SHOWN_CLASSES else ""
    first = names[0][1].split(",")[0] if names else None
    unique = first is not None and sum(first in name.split(", ") for _, name in names) == 1
    examples = [f'"{first}"' if unique else "0", str(int(config["num_classes"]) - 1)]
    return _TEMPLATE.format(
        kind="Images",
        classes=config["num_classes"],
        examples=", ".join(dict.fromkeys(examples)),
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        names=("- " + "\n- ".join(shown) + more) if shown else "They have no names here: give their labels.",
        origin=_origin_lines(provenance),
    )


def _origin_lines(provenance: Mapping[str, Any]) -> str:
    origin, training = provenance.get("origin") or {}, provenance.get("training") or {}
    lines = [f"- {name.replace('_', ' ')}: `{origin[name]}`" for name in ("step", "ema", "weights_sha256") if origin.get(name)]
    sessions = training.get("sessions") or []
    if sessions:
        last = sessions[-1]
        lines.append(f"- trained with drift_accel {last.get('package_version')}, package hash `{last.get('package_hash')}`")
        lines.append(f"- command: `{' '.join(last.get('command') or [])}`")
        lines.append(f"- configuration hash: `{last.get('configuration_hash')}`")
    lines += [f"- {name.replace('_', ' ')}: `{value}`" for name, value in (training.get("identity") or {}).items()]
    return "\n".join(lines) or "Nothing was recorded."
