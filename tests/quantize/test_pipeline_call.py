"""The arguments of a pipeline's call, for every kind of class that has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffc.errors import DiffcError, UsageError
from diffc.quantize.pipeline_call import call_arguments, steps_of


def text_to_image(prompt=None, height=None, width=None, guidance_scale=5.0, negative_prompt=None, generator=None,
                  num_inference_steps=50, output_type="pil"):  # fmt: skip
    pass


def inpaint(prompt=None, image=None, mask_image=None, strength=0.999, height=None, width=None, generator=None,
            num_inference_steps=50, output_type="pil"):  # fmt: skip
    pass


def refine(prompt=None, image=None, strength=0.3, generator=None, num_inference_steps=50, output_type="pil"):
    pass


def arguments(call: Any, **changed: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "seeds": [7, 8],
        "steps": 2,
        "height": 64,
        "width": 96,
        "usual": {"guidance_scale": 5.0},
    }
    return call_arguments(call, ["a fox", "a sign"], **(given | changed))


def test_a_prompt_is_enough_for_text_to_image() -> None:
    found = arguments(text_to_image, guidance=0.0, negative_prompt="blurry")
    assert [g.initial_seed() for g in found.pop("generator")] == [7, 8]
    assert found == {
        "prompt": ["a fox", "a sign"], "num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 96,
        "guidance_scale": 0.0, "negative_prompt": ["blurry", "blurry"],
    }  # fmt: skip


def test_images_that_the_family_leaves_out_stay_out() -> None:
    """FLUX.2 paints with or without images, in one class; its interface was read off a call without any."""
    found = arguments(inpaint, usual={"image": None, "mask_image": None})
    assert found["image"] is None
    assert found["mask_image"] is None


def test_images_and_masks_are_made() -> None:
    found = arguments(inpaint)
    assert "guidance_scale" not in found  # the family's usual argument, which this class does not take
    image, mask = found["image"], found["mask_image"]
    assert (image.shape, mask.shape, found["strength"]) == ((2, 3, 64, 96), (2, 1, 64, 96), 0.999)
    assert image.min() >= 0
    assert image.max() <= 1
    assert float(image[0].std()) > 0.1
    assert not torch.equal(image[0], image[1])
    assert torch.equal(image, arguments(inpaint)["image"])
    assert 0 < float(mask.mean()) < 1


def test_image_to_image_runs_a_step_at_least() -> None:
    found = arguments(refine)
    assert found["strength"] == 0.5  # of 2 steps: 0.3 would leave none
    assert "height" not in found
    assert arguments(refine, steps=10)["strength"] == 0.3

    class Pipe:
        class scheduler:
            @classmethod
            def set_timesteps(cls, count: int) -> None:
                cls.timesteps = range(2 * count)  # of second order

    assert steps_of(Pipe, arguments(refine, steps=10)) == 6


def test_what_a_class_does_not_take_is_refused() -> None:
    with pytest.raises(UsageError, match="takes no guidance scale"):
        arguments(inpaint, guidance=3.0)
    with pytest.raises(UsageError, match="takes no negative prompt"):
        arguments(refine, negative_prompt="blurry")
    with pytest.raises(DiffcError, match="asks for pose"):
        arguments(lambda prompt, pose, generator=None: None)
    with pytest.raises(DiffcError, match=r"takes no prompt[\s\S]*--calibrate synthetic"):
        arguments(lambda image=None, generator=None: None)
