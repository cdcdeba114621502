"""Checkpoints: all of a run's state comes back, and whatever is not whole is refused."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim import SGD, AdamW

from featherweight.common import cpu_state
from featherweight.lab import checkpoint
from featherweight.lab.checkpoint import Checkpoint, Position, newest, restore_optimizer, save
from featherweight.lab.errors import BadInput
from featherweight.sparse import Masks
from tests.models import ConvNet, mlp, train_steps


def small(number: int = 0, rewind: bool = True) -> Checkpoint:
    """A checkpoint of a few bytes in each of its parts."""
    model = nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    train_steps(model, optimizer, inputs=(4, 3))
    return Checkpoint(
        position=Position(level=number, epochs=number + 1, steps=5, finished=number % 2 == 0),
        model=cpu_state(model.state_dict()),
        optimizer=optimizer.state_dict(),
        masks=Masks({"weight": torch.tensor([[True, False, True], [False, True, True]])}),
        rewind={"weight": torch.arange(6.0)} if rewind else {},
        generator_state=torch.Generator().manual_seed(number).get_state(),
        logs={"metrics": number, "timing": 3},
    )


def same(one: object, other: object) -> bool:
    """Compare nested values; tensors bit by bit, dtype and shape included; lists as tuples."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and one.contiguous()
            .flatten()
            .view(torch.uint8)
            .equal(other.contiguous().flatten().view(torch.uint8))
        )
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and set(one) == set(other)
            and all(same(one[k], other[k]) for k in one)
        )
    if isinstance(one, (list, tuple)):
        return (
            isinstance(other, (list, tuple))
            and len(one) == len(other)
            and all(map(same, one, other))
        )
    return type(one) is type(other) and one == other


def assert_same(one: Checkpoint, other: Checkpoint | None) -> None:
    assert other is not None
    for name, value in vars(one).items():
        found = vars(other)[name]
        assert value == found if isinstance(value, Masks) else same(value, found), name


def read(folder: Path) -> Checkpoint | None:
    found, refused = newest(folder)
    assert refused == {}
    return found


OPTIMIZERS = {
    "sgd": lambda p: SGD(p, 0.1),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "fused sgd": lambda p: SGD(p, 0.1, momentum=0.9, fused=True),
    "adamw": lambda p: AdamW(p, 1e-3, weight_decay=0.1),
    "fused adamw": lambda p: AdamW(p, 1e-3, amsgrad=True, fused=True),
    "two groups": lambda p: AdamW([{"params": p[:1], "lr": 1e-5}, {"params": p[1:]}], 1e-3),
}


class TestRoundTrip:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_training_goes_on_as_if_nothing_had_happened(self, name, tmp_path):
        model = mlp()
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        train_steps(model, optimizer)
        masks = Masks.dense(model)
        saved = Checkpoint(Position(0, 1, 5), model.state_dict(), optimizer.state_dict(), masks)
        save(tmp_path, saved)
        found = read(tmp_path)
        assert_same(saved, found)

        again = mlp(seed=7)
        again.load_state_dict(dict(found.model))
        other = OPTIMIZERS[name](list(again.parameters()))
        restore_optimizer(other, found.optimizer)
        for each, its in ((model, optimizer), (again, other)):
            train_steps(each, its, seed=2)
        assert same(dict(model.state_dict()), dict(again.state_dict()))
        assert same(optimizer.state_dict(), other.state_dict())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes_stay(self, dtype, tmp_path):
        model = mlp(norm=False).to(dtype)
        optimizer = AdamW(model.parameters(), 1e-3, fused=True)
        model(torch.randn(4, 16, dtype=dtype)).square().mean().backward()
        optimizer.step()
        state = optimizer.state_dict()
        save(tmp_path, Checkpoint(Position(0, 1, 1), model.state_dict(), state, Masks.dense(model)))
        found = read(tmp_path)
        restored = AdamW(model.parameters(), 1e-3, fused=True)
        restore_optimizer(restored, found.optimizer)
        assert same(restored.state_dict(), state)
        assert same(dict(found.model), dict(model.state_dict()))

    def test_tied_weights(self, tmp_path):
        model = ConvNet()
        saved = Checkpoint(Position(0, 0, 0), model.state_dict(), {}, Masks.dense(model))
        save(tmp_path, saved)
        found = read(tmp_path)
        assert_same(saved, found)
        with torch.no_grad():
            model.head.weight.zero_()
        model.load_state_dict(dict(found.model))
        assert model.twin.weight is model.head.weight
        assert model.twin.weight.any()

    def test_tensors_that_are_views_or_laid_out_otherwise(self, tmp_path):
        base = torch.arange(24.0)
        model = {
            "view": base[2:8],
            "same": base[2:8],
            "transposed": base.view(4, 6).T,
            "channels last": base.view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
            "scalar": torch.tensor(3),
            "empty": torch.zeros(0, 3),
            "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        }
        masks = Masks({"view": torch.ones(6, dtype=torch.bool)})
        save(
            tmp_path, Checkpoint(Position(0, 0, 0), model, {}, masks, rewind={"a": base, "b": base})
        )
        found = read(tmp_path)
        assert same(
            {k: t.contiguous() for k, t in model.items()}, {k: found.model[k] for k in model}
        )
        assert same({"a": base, "b": base}, dict(found.rewind))

    def test_everything_else(self, tmp_path):
        saved = small(3)
        assert_same(saved, _saved(tmp_path, saved))

    @pytest.mark.parametrize(
        "rewound", [None, {"state": {}, "param_groups": []}, small().optimizer]
    )
    def test_optimizer_at_the_rewinding_point(self, rewound, tmp_path):
        saved = Checkpoint(**vars(small()) | {"optimizer_rewind": rewound})
        assert_same(saved, _saved(tmp_path, saved))

    @pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5, 1, 2)])
    def test_masks_of_odd_sizes(self, shape, tmp_path):
        mask = torch.rand(shape) < 0.5
        saved = Checkpoint(Position(0, 0, 0), {"w": torch.zeros(shape)}, {}, Masks({"w": mask}))
        assert_same(saved, _saved(tmp_path, saved))

    def test_masks_keep_the_order_of_the_model(self, tmp_path):
        # Random criteria draw tensor by tensor, so another order would be another run.
        masks = Masks({name: torch.ones(2, dtype=torch.bool) for name in ("z", "b", "a", "c")})
        save(tmp_path, Checkpoint(Position(0, 0, 0), {"z": torch.zeros(2)}, {}, masks))
        assert list(read(tmp_path).masks) == ["z", "b", "a", "c"]

    def test_an_empty_folder_has_none(self, tmp_path):
        assert newest(tmp_path) == (None, {})
        assert newest(tmp_path / "nowhere") == (None, {})


def _saved(folder: Path, what: Checkpoint) -> Checkpoint | None:
    save(folder, what)
    return read(folder)


class TestTwoAreKept:
    def test_numbers_go_on_and_old_ones_go(self, tmp_path):
        for number in range(4):
            path = save(tmp_path, small(number, rewind=False))
            assert path == tmp_path / f"{number:06d}.json"
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [f"00000{n}.{kind}" for n in (2, 3) for kind in ("json", "safetensors")]

    def test_the_rewinding_point_is_written_once(self, tmp_path):
        save(tmp_path, small(0))
        (stored,) = tmp_path.glob("rewind-*")
        before = stored.stat().st_mtime_ns
        save(tmp_path, small(1))
        assert stored.stat().st_mtime_ns == before
        assert stored.stem == f"rewind-{hashlib.sha256(stored.read_bytes()).hexdigest()}"

    def test_discard_leaves_nothing(self, tmp_path):
        save(tmp_path, small())
        (tmp_path / ".000003.safetensors.abcdefgh").touch()  # of a killed write
        (tmp_path / "000009.safetensors").touch()
        checkpoint.discard(tmp_path)
        assert list(tmp_path.iterdir()) == []
        checkpoint.discard(tmp_path / "nowhere")

    def test_tidy_removes_what_was_refused_so_that_two_good_ones_are_kept(self, tmp_path):
        for number in range(2):
            save(tmp_path, small(number))
        spoil(tmp_path / "000001.safetensors", 20)
        _, refused = newest(tmp_path)
        checkpoint.tidy(tmp_path, refused)
        save(tmp_path, small(5))
        found, refused = newest(tmp_path)
        assert (found.position.level, refused) == (5, {})
        spoil(tmp_path / "000001.safetensors", 20)
        assert newest(tmp_path)[0].position.level == 0


def spoil(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture
def two(tmp_path):
    for number in range(2):
        save(tmp_path, small(number))
    return tmp_path


NEWER = ["000001.json", "000001.safetensors"]


class TestDamage:
    @pytest.mark.parametrize("name", NEWER)
    def test_a_flipped_bit_at_every_byte(self, name, two):
        path = two / name
        whole = path.read_bytes()
        assert newest(two)[0].position.level == 1
        for position in range(0, len(whole) - 1, 3):
            spoil(path, position, bit=position % 8)
            found, refused = newest(two)
            assert found.position.level == 0, position
            assert list(refused) == [1]
            path.write_bytes(whole)
        assert newest(two)[0].position.level == 1

    @pytest.mark.parametrize("name", NEWER)
    def test_truncation_at_many_lengths(self, name, two):
        whole = (two / name).read_bytes()
        end = len(whole) - name.endswith("json")  # the final line break says nothing
        for length in [*range(0, end, end // 60), end - 1]:
            (two / name).write_bytes(whole[:length])
            found, refused = newest(two)
            assert found.position.level == 0, length
            assert list(refused) == [1]

    @pytest.mark.parametrize("name", NEWER)
    @pytest.mark.parametrize("tail", [b"\0", b"\n", b" ", b"{}"])
    def test_added_bytes(self, name, tail, two):
        (two / name).write_bytes((two / name).read_bytes() + tail)
        assert newest(two)[0].position.level == 0

    @pytest.mark.parametrize("name", NEWER)
    @pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"\xff", b"{}\n{}\n", b"null"])
    def test_other_content(self, name, content, two):
        (two / name).write_bytes(content)
        assert newest(two)[0].position.level == 0

    def test_missing_tensors(self, two):
        (two / "000001.safetensors").unlink()
        assert newest(two)[0].position.level == 0

    def test_missing_description_is_no_checkpoint(self, two):
        (two / "000001.json").unlink()
        assert newest(two)[0].position.level == 0

    def test_tensors_of_the_other_checkpoint(self, two):
        (two / "000001.safetensors").write_bytes((two / "000000.safetensors").read_bytes())
        assert newest(two)[0].position.level == 0

    def test_a_folder_in_its_place(self, two):
        (two / "000001.json").unlink()
        (two / "000001.json").mkdir()
        assert newest(two)[0].position.level == 0

    def test_both_damaged_leave_none_and_two_reasons(self, two):
        for number in range(2):
            spoil(two / f"00000{number}.safetensors", 30)
        found, refused = newest(two)
        assert found is None
        assert list(refused) == [1, 0]

    @pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
    def test_the_rewinding_point_counts(self, damage, two):
        (path,) = two.glob("rewind-*")
        content = path.read_bytes()
        if damage == "flip":
            spoil(path, len(content) - 1)
        elif damage == "cut":
            path.write_bytes(content[:-1])
        else:
            path.unlink()
        found, refused = newest(two)
        assert found is None
        assert len(refused) == 2

    def test_other_files_are_no_checkpoints(self, two):
        for name in ("notes.json", "7a.json", ".000007.json.abcdefgh", "000009.safetensors"):
            (two / name).write_text("x")
        found, refused = newest(two)
        assert (found.position.level, refused) == (1, {})


def rewrite(path: Path, **changes: object) -> None:
    """Change a description and give it a valid checksum, as a later version would write it."""
    plain = json.loads(path.read_text().partition("\n")[2]) | changes
    text = json.dumps(plain)
    path.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n")


class TestVersions:
    def test_what_is_written_by_hand_is_read(self, two):
        rewrite(two / "000001.json", logs={"metrics": 77})
        assert read(two).logs == {"metrics": 77}

    def test_one_from_the_future_is_refused_and_not_passed_over(self, two):
        # Going on from the older one, or from nothing, would throw the newer version's work away.
        before = {path: path.read_bytes() for path in two.iterdir()}
        rewrite(two / "000001.json", version=checkpoint.VERSION + 1)
        with pytest.raises(BadInput, match="newer featherweight: format version 3, this reads 2"):
            newest(two)
        assert set(two.iterdir()) == set(before)

    @pytest.mark.parametrize(
        "changes",
        [
            {"position": {}},
            {"position": None},
            {"masks": {"w": [3]}},
            {"optimizer": {}},
            {"logs": None, "masks": {}},
        ],
    )
    def test_a_valid_checksum_over_nonsense(self, changes, two):
        rewrite(two / "000001.json", **changes)
        assert newest(two)[0].position.level == 0


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_TOO = SafetensorError(
    "Error while serializing: I/O error: No space left on device (os error 28)"
)


class TestFullDisk:
    @pytest.mark.parametrize("error", [FULL, FULL_TOO])
    @pytest.mark.parametrize("after", [0, 20])
    def test_while_tensors_are_written(self, error, after, tmp_path, monkeypatch):
        save(tmp_path, small(0))
        before = snapshot(tmp_path)

        def save_file(tensors: object, path: Path) -> None:
            Path(path).write_bytes(b"x" * after)
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", save_file)
            with pytest.raises(type(error)):
                save(tmp_path, small(1))
        assert snapshot(tmp_path) == before
        assert_same_level(tmp_path, 0)
        save(tmp_path, small(2))
        assert_same_level(tmp_path, 2)

    @pytest.mark.parametrize(
        "call", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.write_text"]
    )
    @pytest.mark.parametrize("nth", [1, 2, 3])
    def test_at_each_step_of_writing(self, call, nth, tmp_path, monkeypatch):
        save(tmp_path, small(0, rewind=False))
        before = snapshot(tmp_path)
        calls = fail_at(monkeypatch, call, nth)
        try:
            save(tmp_path, small(1))
        except OSError:
            monkeypatch.undo()
            assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
            assert before.items() <= snapshot(tmp_path).items()
            assert_same_level(tmp_path, 0)
        else:
            monkeypatch.undo()
            assert calls[0] < nth, "the error was swallowed"
            assert_same_level(tmp_path, 1)
        save(tmp_path, small(2))
        assert_same_level(tmp_path, 2)


def fail_at(monkeypatch: pytest.MonkeyPatch, call: str, nth: int) -> list[int]:
    """Make the nth call of a function fail with a full disk; returns the count of calls."""
    owner_name, _, name = call.rpartition(".")
    owner = {"os": os, "pathlib.Path": Path}[owner_name]
    original, calls = getattr(owner, name), [0]

    def failing(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == nth:
            raise FULL
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return calls


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_level(folder: Path, level: int) -> None:
    found, refused = newest(folder)
    assert (found.position.level, refused) == (level, {})
