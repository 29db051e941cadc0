"""What a finished run learned."""

from pathlib import Path

from safetensors import safe_open


def tensors(config) -> dict[str, bytes]:
    """Everything in the last checkpoint, optimizer included, byte for byte."""
    found = {}
    folder = Path(config.run.dir) / config.run.name / f"step_{config.train.steps}"
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
    assert any("experts.3" in key for key in found)
    return found
