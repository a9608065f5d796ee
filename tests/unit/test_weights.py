"""Declarations of weights: the shapes, counts and initial values derived from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdistill import hf_tensors, weights
from jaxdistill.models import FAMILIES, decoder


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_number_of_parameters_is_that_of_transformers(model_type: str, tied: bool):
    import transformers

    values = tiny.hf_config(model_type, tied=tied)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
    template = decoder.template(tiny.config(model_type, tied=tied))
    assert weights.count(template) == sum(p.numel() for p in model.parameters())
    theirs = tiny.of_each_expert({name: p.detach().numpy() for name, p in model.named_parameters()})
    assert hf_tensors.Stacked(template, lambda *_: np.zeros(0)).shapes() == {
        name: a.shape for name, a in theirs.items()
    }


def test_shape_in_the_file_follows_its_letters():
    w = weights.Declared("LDNH", (2, 8, 3, 4), weights.normal, "w.{}", "(N H) D")
    assert w.layer_dims == "D N H"
    assert w.hf_shape == (12, 8)


def test_random_start_is_the_same_on_every_mesh():
    c = tiny.config("qwen2")
    drawn = []
    for sizes in ({}, {"fsdp": 2, "tensor": 2}):
        with tiny.mesh(**sizes):
            params = weights.init(decoder.template(c), seed=3)
            for w, like in zip(
                jax.tree.leaves(params), jax.tree.leaves(weights.abstract(decoder.template(c))), strict=True
            ):
                assert w.dtype == like.dtype == jnp.float32
                assert w.shape == like.shape
                assert w.sharding.is_equivalent_to(like.sharding, w.ndim)
            drawn.append(jax.device_get(params))
    jax.tree.map(np.testing.assert_array_equal, *drawn)
    assert (drawn[0].blocks.attn_norm == 1).all()
    assert (drawn[0].blocks.b_q == 0).all()
    assert drawn[0].embed.std() == pytest.approx(0.02, rel=0.1)
    with tiny.mesh():
        assert not np.array_equal(weights.init(decoder.template(c), seed=4).embed, drawn[0].embed)
