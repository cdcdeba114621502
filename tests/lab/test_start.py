"""What a run starts from: scoring batches, masks before training, and coupled weights."""

import pytest
import torch
from safetensors.torch import load_file

from featherweight.lab.errors import BadInput
from featherweight.lab.recipe import START_METHODS
from featherweight.lab.runs import run
from featherweight.lab.setup import make_model, read_data
from featherweight.lab.start import BATCHES, PER_CLASS, couple, scoring_batches, start_masks
from featherweight.sparse import Masks
from tests.lab.tiny_runs import METHODS, tiny


def masks_of(recipe, seed=0):
    data = read_data(recipe)
    model = make_model(recipe, data, seed)
    return start_masks(recipe, model, seed, lambda: scoring_batches(data, seed, "cpu")), model


class TestScoringBatches:
    def test_hold_each_class_alike_and_follow_the_seed(self):
        data = read_data(tiny())
        found = scoring_batches(data, 3, "cpu")
        assert len(found) == BATCHES
        for images, labels in found:
            assert images.shape == (PER_CLASS * 10, *data.shape)
            assert labels.bincount().tolist() == [PER_CLASS] * 10
        again, other = scoring_batches(data, 3, "cpu"), scoring_batches(data, 4, "cpu")
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(found, again, strict=True))
        assert not torch.equal(found[0][0], other[0][0])

    def test_images_are_normalised_training_images(self):
        data = read_data(tiny())
        images, labels = scoring_batches(data, 0, "cpu")[0]
        shape = (-1, *[1] * (data.train.images.dim() - 2))
        pixels = data.train.images.float()
        pixels = pixels / 255 if data.train.images.dtype == torch.uint8 else pixels
        pixels = (pixels - data.mean.view(shape)) / data.std.view(shape)
        mode = "donot_use_mm_for_euclid_dist"
        nearest = torch.cdist(images.flatten(1), pixels.flatten(1), compute_mode=mode).min(dim=1)
        assert nearest.values.max() < 1e-3
        assert torch.equal(data.train.labels[nearest.indices], labels)


class TestStartMasks:
    @pytest.mark.parametrize("method", START_METHODS)
    def test_every_method_keeps_its_density_inside_the_support(self, method):
        recipe = tiny(sparse__method=method, sparse__density=0.2, sparse__support__density=0.6)
        masks, model = masks_of(recipe)
        assert masks.nonzeros == round(0.2 * Masks.dense(model).numel)
        support, _ = masks_of(tiny(sparse__method="lrr", sparse__support__density=0.6))
        assert masks <= support
        assert masks_of(recipe)[0] == masks

    @pytest.mark.parametrize("method", START_METHODS)
    def test_every_method_can_make_the_support(self, method):
        recipe = tiny(
            sparse__method="lrr", sparse__support__density=0.6, sparse__support__method=method
        )
        masks, model = masks_of(recipe)
        assert masks.nonzeros == round(0.6 * Masks.dense(model).numel)

    @pytest.mark.parametrize("structure", ["2:4", "channel"])
    def test_structure_is_obeyed(self, structure):
        from featherweight.sparse import satisfies

        recipe = tiny(sparse__method="magnitude", sparse__density=0.3, sparse__structure=structure)
        assert satisfies(masks_of(recipe)[0], structure)

    @pytest.mark.parametrize("method", ["rigl", "phew", "edge-popup"])
    def test_methods_without_structure_refuse_one(self, method, tmp_path):
        recipe = tiny(sparse__method=method, sparse__density=0.3, sparse__structure="2:4")
        with pytest.raises(BadInput, match=r"structure: rigl takes|phew takes no|edge-popup takes"):
            run(recipe, 0, tmp_path)

    def test_dense_with_a_density_is_refused(self):
        with pytest.raises(BadInput, match="method dense keeps every weight"):
            masks_of(tiny(sparse__density=0.5))

    def test_masks_of_an_unfinished_run_are_refused(self, tmp_path):
        with pytest.raises(BadInput, match="is no finished run"):
            masks_of(tiny(sparse__masks_from=str(tmp_path)))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return run(tiny(**METHODS["lrr"]), 0, tmp_path_factory.mktemp("learned"))


class TestCouple:
    def coupled(self, learned, **choices):
        recipe = tiny(
            sparse__masks_from=str(learned.parent),
            sparse__couple__run=str(learned.parent),
            **choices,
        )
        masks, model = masks_of(recipe)
        couple(recipe, model, masks, 0)
        return masks, masks.weights(model)

    def test_signs_and_magnitudes_come_from_where_the_recipe_says(self, learned):
        theirs = load_file(learned / "level-02" / "model.safetensors")
        masks, both = self.coupled(
            learned, sparse__couple__signs="learned", sparse__couple__magnitudes="learned"
        )
        assert masks == Masks.load(learned / "level-02" / "masks.safetensors")
        assert all(torch.equal(both[n], theirs[n]) for n in masks)
        _, signs = self.coupled(
            learned, sparse__couple__signs="learned", sparse__couple__magnitudes="random"
        )
        assert all(torch.equal(signs[n].sign(), theirs[n].sign()) for n in masks)
        assert not all(torch.equal(signs[n], theirs[n]) for n in masks)

    def test_a_whole_run_trains_inside_the_mask(self, learned, tmp_path):
        recipe = tiny(
            sparse__masks_from=str(learned.parent),
            sparse__couple__run=str(learned.parent),
            sparse__couple__signs="learned",
        )
        directory = run(recipe, 0, tmp_path)
        masks = [
            Masks.load(f / "masks.safetensors")
            for f in (directory / "level-00", learned / "level-02")
        ]
        assert masks[0] == masks[1]

    def test_a_run_that_is_missing_is_one_line(self, tmp_path):
        recipe = tiny(sparse__couple__run=str(tmp_path))
        model = make_model(recipe, read_data(recipe), 0)
        with pytest.raises(BadInput, match=r"sparse\.couple: .* is no finished run"):
            couple(recipe, model, Masks.dense(model), 0)
