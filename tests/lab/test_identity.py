"""Names of runs: what enters them and what does not."""

import dataclasses
from typing import Annotated

import pytest
from pydantic import Field, TypeAdapter

from featherweight.lab import identity as identity_module
from featherweight.lab.identity import distinctive, identity
from featherweight.lab.parse import build, load, plain
from featherweight.lab.recipe import STRICT, DataRecipe, ExecuteRecipe, FitRecipe, Recipe
from tests.lab.test_recipe import EVERY_KEY


class TestIdentity:
    @pytest.mark.parametrize(
        ("recipe", "overrides", "name"),
        [
            ("dense-digits", [], "dense-digits-44136fa3"),
            ("lrr-digits", ["sparse.reset=[norms]", "sparse.rewind=1ep"], "lrr-digits-6057138c"),
            ("random-cifar10", ["data.path=/x"], "random-cifar10-8d7123a4"),
        ],
    )
    def test_names_of_finished_runs_never_change(self, recipe, overrides, name):
        # Somebody's runs/ folder bears these names: with another hash they would be trained anew.
        # If this fails, a default or the hash has changed; make the change one that keeps them.
        assert identity(load(recipe, overrides)[0]) == name

    def test_the_default_recipe_has_nothing_distinctive(self):
        assert distinctive(Recipe()) == {}

    @pytest.mark.parametrize(
        "override",
        ["seeds=[9]", "data.path=/elsewhere", "execute.threads=7", "execute.checkpoint_seconds=1"],
    )
    def test_neutral_fields_do_not_matter(self, override):
        assert identity(load("lrr-digits", [override])[0]) == identity(load("lrr-digits")[0])

    def test_the_name_stands_before_the_same_hash(self):
        (before,), (after,) = load("lrr-digits"), load("lrr-digits", ["name=mine"])
        assert identity(after) == identity(before).replace("lrr-digits", "mine")

    @pytest.mark.parametrize("key", [k for k in EVERY_KEY if k not in identity_module.NEUTRAL])
    def test_every_other_field_matters(self, key):
        # Methods, an optimizer and an initialisation that have options
        base = [
            ("model.init", "skipinit" if key == "model.init" else "risotto"),
            ("sparse.method", "imp"),
            ("depth.method", "a-mod" if key == "depth.method" else "mod"),
            ("fit.optimizer", "ham-sgd"),
            ("fit.options", {"alpha": 1.0}),
        ]
        changed = build({}, [*base, (key, EVERY_KEY[key])])
        assert identity(changed) != identity(build({}, base))

    @pytest.mark.parametrize("name", ["hf", "image-folder"])
    def test_where_the_path_is_the_data_it_matters(self, name):
        one, other = ({"data": {"name": name, "path": path}} for path in ("user/a", "user/b"))
        assert identity(build(one)) != identity(build(other))

    def test_masks_from_counts_by_name_wherever_they_lie(self):
        paths = ["/a/imp-12345678", "b/imp-12345678", "b/imp-87654321"]
        names = [identity(build({"sparse": {"masks_from": path}})) for path in paths]
        assert names[0] == names[1] != names[2]

    def test_writing_a_default_out_changes_nothing(self):
        assert identity(build(plain(Recipe()))) == identity(Recipe())

    def test_a_new_field_with_a_neutral_default_changes_nothing(self, monkeypatch):
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class LaterFit(FitRecipe):
            __pydantic_config__ = STRICT
            later: Annotated[float, Field(ge=0)] = 0.0

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class LaterRecipe(Recipe):
            __pydantic_config__ = STRICT
            fit: LaterFit = dataclasses.field(default_factory=LaterFit)

        (recipe,) = load("lrr-digits")
        before, tree = identity(recipe), plain(recipe)
        adapter = TypeAdapter(LaterRecipe)
        monkeypatch.setattr(identity_module, "plain", lambda r: adapter.dump_python(r, mode="json"))
        monkeypatch.setattr(identity_module, "Recipe", LaterRecipe)
        assert identity(adapter.validate_python(tree)) == before
        tree["fit"]["later"] = 0.5
        assert identity(adapter.validate_python(tree)) != before

    def test_recipes_are_frozen(self):
        for node in (Recipe(), DataRecipe(), FitRecipe(), ExecuteRecipe()):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(node, dataclasses.fields(node)[0].name, None)
