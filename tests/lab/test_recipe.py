"""Recipes: from YAML and overrides to checked values, names of runs."""

import dataclasses
import re

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from featherweight.lab.errors import BadInput
from featherweight.lab.identity import identity
from featherweight.lab.parse import build, describe, load, plain, read_text, shipped, to_yaml
from featherweight.lab.recipe import Recipe
from featherweight.lab.recipe_form import Form, read_yaml

EVERY_KEY = {
    "name": "other",
    "data.name": "cifar10",
    "data.path": "/some/where, with a comma: and more",
    "data.validation": 0.25,
    "data.limit": 17,
    "data.augment": "flip",
    "data.split_seed": 3,
    "model.name": "package.module:function",
    "model.options": {"width": 5, "text": "1e-4", "rates": [1e-4, 1.5e300], "on": "on", "x": None},
    "model.init": "risotto",
    "model.init_options": {"alpha": 0.5},
    "sparse.method": "lrr",
    "sparse.density": 0.1,
    "sparse.levels": 0,
    "sparse.densities": [1.0, 0.5, 0.25],
    "sparse.iterations": 7,
    "sparse.structure": "2:4",
    "sparse.options": {"keep_units": True},
    "sparse.couple.run": "runs/y-12345678",
    "sparse.couple.signs": "learned",
    "sparse.couple.magnitudes": "random",
    "sparse.per_level": 0.3,
    "sparse.allocation": "layer",
    "sparse.criterion": "random",
    "sparse.reset": ["shuffled-magnitudes", "norms"],
    "sparse.rewind": "3it",
    "sparse.masks_from": "runs/x-12345678",
    "sparse.optimizer_state": "carry",
    "sparse.support.method": "synflow",
    "sparse.support.density": 0.5,
    "sparse.support.allocation": "erk",
    "sparse.sampling": "bernoulli",
    "sparse.legacy": True,
    "sparse.repair": True,
    "sparse.include": ["*.weight"],
    "sparse.exclude": ["conv1.*", "fc?"],
    "depth.method": "mod",
    "depth.capacity": [0.5, 0.25],
    "depth.layers": [1, 3],
    "depth.options": {"gate": "raw"},
    "depth.from_run": "runs/z-12345678",
    "depth.auxiliary": 0.5,
    "fit.length": "7it",
    "fit.batch_size": 3,
    "fit.optimizer": "ham-adamw",
    "fit.options": {"alpha": 2.0},
    "fit.learning_rate": 1e-4,
    "fit.momentum": 0.5,
    "fit.nesterov": True,
    "fit.scalar_rate": 0.1,
    "fit.weight_decay": 1e-05,
    "fit.schedule": "step",
    "fit.warmup": "0ep",
    "fit.warmup_start": 0.0,
    "fit.milestones": ["1ep", "30it"],
    "fit.gamma": 0.5,
    "fit.final": 0.125,
    "fit.label_smoothing": 0.1,
    "fit.beta": 0.5,
    "fit.rescale": "2ep",
    "fit.rescale_until": 0.5,
    "fit.clip": 2.0,
    "fit.distillation": 0.5,
    "fit.temperature": 4.0,
    "execute.form": "sparse",
    "execute.device": "cpu",
    "execute.precision": "bf16",
    "execute.matmul_precision": "medium",
    "execute.channels_last": True,
    "execute.compile": True,
    "execute.threads": 1,
    "execute.checkpoint_seconds": 0.0,
    "seeds": [4, 0],
}


def every_key_changed() -> Recipe:
    return build({}, list(EVERY_KEY.items()))


def flat(tree: dict, prefix: str = "") -> dict:
    """Flatten as far as EVERY_KEY does: a model's options are one value."""
    result = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        result |= (
            flat(value, f"{path}.")
            if isinstance(value, dict) and not path.endswith("options")
            else {path: value}
        )
    return result


class TestRoundTrip:
    def test_the_list_above_names_every_key_and_changes_it(self):
        assert set(EVERY_KEY) == {key for key, _, _ in describe()}
        default = flat(plain(Recipe()))
        assert not [key for key, value in EVERY_KEY.items() if default[key] == value]

    def test_every_value_arrives(self):
        assert flat(plain(every_key_changed())) == EVERY_KEY

    def test_yaml_holds_everything(self, tmp_path):
        recipe = every_key_changed()
        file = tmp_path / "again.yaml"
        file.write_text(to_yaml(recipe), encoding="utf-8")
        assert load(str(file)) == [recipe]

    @pytest.mark.parametrize(
        "text", ["1e-4", "1E5", "-1.5e3", "2024-01-31", "null", "yes", "0x1f", "é\n#"]
    )
    def test_text_that_looks_like_something_else_stays_text(self, text, tmp_path):
        recipe = build({"model": {"options": {"text": text}}})
        file = tmp_path / "again.yaml"
        file.write_text(to_yaml(recipe), encoding="utf-8")
        assert load(str(file))[0].model.options == {"text": text}

    def test_defaults_are_described_as_they_are(self):
        default = flat(plain(Recipe()))
        for key, value, text in describe():
            assert text, f"{key} has no description"
            assert value == ("null" if default[key] is None else str(default[key]))


class TestShipped:
    @pytest.mark.parametrize("name", list(shipped()))
    def test_begins_with_the_command_that_runs_it(self, name):
        first = shipped()[name].splitlines()[0]
        command = re.fullmatch(r"# featherweight run (\S+)((?: \S+=\S+)*)", first)
        assert command, first
        assert command[1] == name
        (recipe,) = load(name, command[2].split())
        assert recipe.name == name

    @pytest.mark.parametrize("name", list(shipped()))
    def test_says_what_it_is_in_a_comment(self, name):
        assert shipped()[name].splitlines()[1] == "#"
        assert shipped()[name].splitlines()[2].startswith("# ")

    def test_is_found_by_its_three_names(self):
        assert (
            read_text("lrr-digits")
            == read_text("recipes/lrr-digits.yaml")
            == read_text("lrr-digits.yaml")
        )

    def test_a_file_goes_before_a_shipped_recipe(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "lrr-digits.yaml").write_text("seeds: [7]")
        assert load("lrr-digits.yaml")[0].seeds == [7]
        assert load("lrr-digits")[0].seeds == [0, 1, 2]


def refusal(*overrides: str, recipe: str = "dense-digits") -> str:
    with pytest.raises(BadInput) as caught:
        load(recipe, overrides)
    return one_line(caught.value)


def one_line(error: BadInput) -> str:
    assert "\n" not in str(error)
    return str(error)


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("key", "nearest", "allowed"),
        [
            ("modle", "model", "execute"),
            ("fit.lenght", "length", "batch_size"),
            ("sparse.support.densty", "density", "allocation"),
            ("execute.presicion", "precision", "compile"),
        ],
    )
    def test_message_names_path_nearest_and_allowed(self, key, nearest, allowed):
        message = refusal(f"{key}=1")
        assert f"unknown key {key!r}" in message
        assert f"did you mean {nearest!r}" in message
        assert allowed in message

    def test_in_a_file_too(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text("sparse: {support: {dens: 1}}")
        assert "'sparse.support.dens'" in refusal(recipe=str(file))

    def test_the_number_of_further_errors_is_said(self):
        assert "(and 1 more)" in refusal("fit.a=1", "fit.b=1")

    def test_a_key_below_a_value(self):
        assert "'seeds' holds a value" in refusal("seeds.first=1")


class TestValues:
    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("fit.batch_size=many", "fit.batch_size: "),
            ("fit.batch_size=64.5", "64.5"),
            ("fit.batch_size=true", "fit.batch_size: true and false are allowed for switches only"),
            ("seeds=[0,true]", "seeds.1: true and false are allowed for switches only"),
            ("fit.learning_rate=yes", "switches only"),
            ("fit.nesterov=5", "fit.nesterov: "),
            ("fit.learning_rate=0", "greater than 0"),
            ("fit.learning_rate=-1e-3", "greater than 0"),
            ("fit.learning_rate=.inf", "must be finite"),
            ("fit.weight_decay=.nan", "must be finite"),
            ("fit.clip=1e400", "must be finite"),
            ("fit.batch_size=0", "greater than or equal to 1"),
            ("fit.momentum=1", "less than 1"),
            ("sparse.density=0", "greater than 0"),
            ("sparse.density=1.01", "less than or equal to 1"),
            ("sparse.per_level=1", "less than 1"),
            ("sparse.levels=-1", "greater than or equal to 0"),
            ("sparse.support.density=2", "sparse.support.density: "),
            ("sparse.method=lrrr", "did you mean 'lrr'"),
            ("sparse.allocation=erx", "one of global, layer"),
            ("sparse.criterion=none", "unknown criterion"),
            ("sparse.reset=norms", "valid list"),
            ("sparse.reset=[norm]", "did you mean 'norms'"),
            ("sparse.include=fc*", "valid list"),
            ("data.name=digit", "did you mean 'digits'"),
            ("data.augment=crop", "'crop-flip'"),
            ("data.limit=0", "greater than or equal to 1"),
            ("data.validation=1", "less than 1"),
            ("model.name=mlpp", "did you mean 'mlp'"),
            ("model=mlp", "model: "),
            ("model.options=[1]", "model.options: "),
            ("model.options={1: 2}", "keys must be text"),
            ("model.options={a: !!binary /w==}", "model.options.a: must be text"),
            ("model.options={a: [!!set {b}]}", "model.options.a.0"),
            ("model.options=&a {b: *a}", "inside itself"),
            ("name=a b", "name: "),
            ("name=../up", "name: "),
            ("seeds=[]", "at least 1 item"),
            ("seeds=[-1]", "seeds.0: "),
            ("seeds=3", "valid list"),
            ("execute.device=tpu", "'cpu'"),
            ("execute.threads=0", "greater than or equal to 1"),
            ("fit=null", "fit: "),
        ],
    )
    def test_bad_value_is_refused_on_one_line(self, override, said):
        message = refusal(override)
        assert said in message
        assert message.startswith("dense-digits: ")

    @pytest.mark.parametrize(
        "override", ["fit.length", "=3", "", "fit.length=[", "fit.length={a", "fit.clip=0x_"]
    )
    def test_what_is_no_override(self, override):
        assert repr(override) in refusal(override)

    def test_a_long_value_is_cut(self):
        assert len(refusal("fit.length=" + "9" * 5000)) < 400


class TestFiles:
    @pytest.mark.parametrize(
        "name", ["lrr-digit", "a" * 300, "no/such.yaml", "", ".", "/", "recipes/../x"]
    )
    def test_unknown_recipe_lists_the_known(self, name):
        with pytest.raises(BadInput, match="recipe"):
            load(name)

    @pytest.mark.parametrize(
        "content",
        [
            b"- 1",
            b"text",
            b"12",
            b"a: [",
            b"a: b: c",
            b"\xff\xfe\x00",
            b"\x00",
            b"[" * 3000,
            b"!!python/object:os.system {}",
        ],
    )
    def test_a_file_that_is_no_recipe(self, content, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_bytes(content)
        assert "mine.yaml" in refusal(recipe=str(file))

    def test_an_empty_file_is_all_defaults(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text("# nothing\n")
        assert load(str(file)) == [dataclasses.replace(Recipe(), name="mine")]

    def test_a_name_in_the_file_goes_before_the_file_name(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text("name: yours")
        assert load(str(file))[0].name == "yours"


class TestOverrides:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-4", 1e-4),
            ("1E-4", 1e-4),
            ("1.5e3", 1500.0),
            ("+2e0", 2.0),
            ("-1e2", -100.0),
            ("0.5", 0.5),
        ],
    )
    def test_exponents_make_numbers_everywhere(self, text, value, tmp_path):
        by_override = load("dense-digits", [f"model.options.x={text}"])[0].model.options["x"]
        file = tmp_path / "mine.yaml"
        file.write_text(f"model: {{options: {{x: {text}}}}}")
        by_file = load(str(file))[0].model.options["x"]
        assert by_override == by_file == value
        assert type(by_override) is type(by_file) is float

    def test_lists_null_and_text(self):
        (recipe,) = load(
            "lrr-digits",
            ["seeds=[3,4]", "data.limit=null", "sparse.levels=2", "sparse.reset=[norms, nothing]"],
        )
        assert recipe.seeds == [3, 4]
        assert recipe.data.limit is None
        assert recipe.sparse.reset == ["norms", "nothing"]

    def test_the_last_of_two_wins(self):
        assert load("dense-digits", ["fit.batch_size=3", "fit.batch_size=5"])[0].fit.batch_size == 5

    def test_a_value_may_hold_an_equals_sign(self):
        assert load("dense-digits", ["data.path=/a=b"])[0].data.path == "/a=b"

    def test_quotes_keep_commas(self):
        assert load("dense-digits", ['data.path="/a,b"'])[0].data.path == "/a,b"

    def test_a_mapping_replaces_the_whole(self):
        (recipe,) = load("lrr-digits", ["sparse={method: random, density: 0.5}"])
        assert (recipe.sparse.method, recipe.sparse.per_level) == ("random", 0.2)

    def test_commas_sweep_in_all_combinations(self):
        recipes = load(
            "random-digits", ["sparse.density=0.1,1e-2", "sparse.allocation=er,erk,uniform"]
        )
        found = [(r.sparse.density, r.sparse.allocation) for r in recipes]
        assert found == [(d, a) for d in (0.1, 0.01) for a in ("er", "erk", "uniform")]
        assert len({identity(r) for r in recipes}) == 6

    def test_recipes_of_a_sweep_share_nothing(self):
        first, second = load("dense-digits", ["model.options.width=3,4"])
        assert (first.model.options, second.model.options) == ({"width": 3}, {"width": 4})


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
keys = st.sampled_from(
    [*EVERY_KEY, "data", "model", "fit", "sparse.support", "model.options.width"]
)
garbage = st.builds(
    "{}={}".format, keys | st.text(max_size=12), st.text(max_size=12) | values.map(yaml.safe_dump)
)


class TestGarbage:
    @settings(max_examples=200, deadline=None)
    @given(st.lists(garbage | st.text(max_size=20), max_size=3))
    def test_a_recipe_or_one_line(self, overrides):
        try:
            recipes = load("lrr-digits", overrides)
        except BadInput as error:
            one_line(error)
        else:
            for recipe in recipes:
                assert yaml.safe_load(to_yaml(recipe)) is not None
                assert re.fullmatch(r"[\w.-]+-[0-9a-f]{8}", identity(recipe), re.ASCII)

    @settings(max_examples=200, deadline=None)
    @given(values)
    @example("\x85")
    @example("a\u2028b")
    def test_options_that_are_taken_come_back(self, value):
        try:
            recipe = build({"model": {"options": {"x": value}}})
        except BadInput as error:
            one_line(error)
        else:
            assert build(read_yaml(to_yaml(recipe))) == recipe

    @settings(max_examples=100, deadline=None)
    @given(st.binary(max_size=40))
    def test_any_file(self, content):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Form, "read_text", lambda *_: ("x", content.decode("latin-1")))
            try:
                load("x")
            except BadInput as error:
                one_line(error)
