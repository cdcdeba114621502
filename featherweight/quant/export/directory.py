"""Model directories: written whole or not at all, and read without running anything in them."""

from __future__ import annotations

import copy
import errno
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from featherweight.quant.export.layouts import (
    FORMATS,
    Layout,
    check_grids,
    layout_config,
    packed_state,
)
from featherweight.quant.quantize import quantized_matrices

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files beside the weights that a copy of the model needs."""

_RESERVE = 16 * 2**20  # bytes beside the weights


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling; on success it becomes ``path``, on any error it is removed.

    Raises:
        FileExistsError: ``path`` exists and is not an empty directory.
        OSError: the disk is full; nothing is left behind.
    """
    target = Path(path)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, f"disk is full, {target} was not written") from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raise FileExistsError unless there is nothing at ``path``, or an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; name a new directory")


def require_space(path: Path, needed: int) -> None:
    """Raise OSError if the file system of a directory has less than ``needed`` bytes free."""
    free = shutil.disk_usage(path).free
    if free < needed + _RESERVE:
        raise OSError(
            errno.ENOSPC,
            f"{path} has {free / 2**20:.0f} MiB free, {(needed + _RESERVE) / 2**20:.0f} are needed",
        )


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    format: str = "compressed-tensors",
    source: str | Path | None = None,
    shard_size: str = "5GB",
) -> Path:
    """Write a model that stock loaders read, whole or not at all.

    Args:
        model: a causal language model of transformers; quantised for all formats but ``plain``.
        directory: to make; must not exist, or be empty.
        format: a name of :data:`FORMATS`. ``gptq`` stores scales in float16: give the quantiser
            ``scale_dtype=torch.float16`` for weights that are read back to the bit.
        source: a model directory whose tokenizer and other companions are copied.
        shard_size: largest safetensors file, such as ``"5GB"``.

    Returns:
        The directory.

    Raises:
        ValueError: the format is unknown or can't hold the model.
        FileExistsError: the directory holds something.
        OSError: the disk is full.
    """
    check_format(model, format)
    with new_directory(directory) as temporary:
        write_model(model, temporary, format=format, source=source, shard_size=shard_size)
    return Path(directory)


def check_format(model: nn.Module, format: str) -> None:
    """Raise ValueError unless a format is known and can hold a model."""
    layout, layers = FORMATS[format].method, quantized_matrices(model)
    if layout is None:
        return
    if not layers:
        raise ValueError(f"format {format!r} needs a quantised model; format='plain' takes any")
    check_grids(layout, {name: layer.quantized.grid for name, layer in layers.items()})
    for name, layer in layers.items():
        layout.check(name, layer.quantized)


def write_model(
    model: nn.Module,
    directory: Path,
    *,
    format: str,
    source: str | Path | None = None,
    shard_size: str = "5GB",
) -> None:
    """Write what :func:`save` does into a directory that is there, file by file."""
    layout = FORMATS[format].method
    if layout is None:
        _save_plain(model, directory, shard_size)
    else:
        state = packed_state(model, quantized_matrices(model), layout)
        _save_packed(model, directory, state, layout, shard_size)
    if source is not None:
        copy_companions(Path(source), directory)


def _save_plain(model: nn.Module, directory: Path, shard_size: str) -> None:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    require_space(directory, size)
    model.save_pretrained(directory, max_shard_size=shard_size)  # type: ignore[operator]


def _save_packed(
    model: nn.Module, directory: Path, state: Mapping[str, Tensor], layout: Layout, shard_size: str
) -> None:
    require_space(directory, sum(t.numel() * t.element_size() for t in state.values()))
    described = layout_config(model, quantized_matrices(model), layout)
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.quantization_config = described
    config.save_pretrained(directory)
    if described["quant_method"] == "gptq":
        _write_json(directory / "quantize_config.json", described)
    _write_shards(directory, state, shard_size)


def _write_shards(directory: Path, state: Mapping[str, Tensor], shard_size: str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = split_torch_state_dict_into_shards(
        dict(state), filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size
    )
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: state[key] for key in keys}, directory / name, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence; what is there stays."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def load(directory: str | Path, *, allow_pickle: bool = False) -> nn.Module:
    """Read a causal language model from safetensors, in the dtype it is stored in.

    Nothing is downloaded, and no code of the directory runs. A directory whose only weights are
    one GGUF file is read by dequantising it, which needs the ``gguf`` package.

    Args:
        directory: with ``config.json`` and ``*.safetensors``, or with one ``*.gguf``.
        allow_pickle: read ``*.bin`` where there are no safetensors, with ``weights_only=True``.

    Raises:
        ValueError: not a model directory, only pickled weights, or quantised already.
    """
    path = Path(directory)
    gguf = check_directory(path, allow_pickle)
    transformers = import_transformers()
    pickled = gguf is None and not any(path.glob("*.safetensors"))
    options = {"gguf_file": gguf.name} if gguf else {"use_safetensors": not pickled}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", local_files_only=True, trust_remote_code=False, **options
    )
    return _plain(model) if gguf else model


def check_directory(path: Path, allow_pickle: bool = False) -> Path | None:
    """Return the GGUF file to read, or None where there are safetensors.

    Raises:
        ValueError: not a model directory, only pickled weights, or quantised already.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    ggufs = sorted(path.glob("*.gguf"))
    if not (path / "config.json").is_file():
        if len(ggufs) != 1:
            raise ValueError(f"{path} is not a model directory: it has no config.json")
        return ggufs[0]
    if "quantization_config" in read_config(path):
        raise ValueError(f"{path} is quantised already; start from the original weights")
    if any(path.glob("*.safetensors")) or (allow_pickle and any(path.glob("*.bin"))):
        return None
    if any(path.glob("*.bin")):
        raise ValueError(f"{path} holds pickled weights only; allow_pickle=True reads them")
    raise ValueError(f"{path} holds no weights: no *.safetensors")


def read_config(path: Path) -> dict[str, Any]:
    """Return a directory's ``config.json``.

    Raises:
        ValueError: it can't be read or holds no object.
    """
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / 'config.json'} can't be read: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'} must hold an object")
    return config


def _plain(model: Any) -> nn.Module:
    """Forget that the weights came from GGUF, so that the model can be saved."""
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model  # type: ignore[no-any-return]


def import_transformers() -> Any:
    """Import transformers, or say how to install it."""
    try:
        import transformers
    except ImportError:
        raise ImportError("transformers is missing: pip install 'featherweight[hf]'") from None
    return transformers
