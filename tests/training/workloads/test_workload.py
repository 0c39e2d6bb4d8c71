"""What workloads share."""

from __future__ import annotations

import pytest

from volo.config import recipe_from_dict
from volo.training.workloads.workload import model_options


def test_the_variant_gives_the_drop_path_rate_unless_the_recipe_does() -> None:
    recipe = recipe_from_dict({"model": {"options": {"stem_dim": 8}}, "data": {"img_size": 64}})
    assert model_options(recipe, "volo_d3") == {"img_size": 64, "drop_path_rate": 0.5, "stem_dim": 8}
    assert model_options(recipe, "volo_nano")["drop_path_rate"] == 0.0
    recipe = recipe_from_dict({"model": {"drop_path_rate": 0.3}})
    assert model_options(recipe, "volo_d3")["drop_path_rate"] == 0.3


@pytest.mark.parametrize(
    ("name", "instead"), [("num_classes", "follows from the data"), ("drop_path_rate", "use model.drop_path_rate")]
)
def test_options_with_a_place_of_their_own_are_refused(name: str, instead: str) -> None:
    with pytest.raises(ValueError, match=f"must not hold {name}: .*{instead}"):
        model_options(recipe_from_dict({"model": {"options": {name: 1}}}), "volo_d1")


@pytest.mark.parametrize("channels", [1, 4])
def test_images_have_three_channels(channels: int) -> None:
    with pytest.raises(ValueError, match=f"in_chans is {channels}, but images are given to the model as RGB"):
        model_options(recipe_from_dict({"model": {"options": {"in_chans": channels}}}), "volo_d1")
