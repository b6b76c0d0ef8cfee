"""`attention` on windows and arguments that are drawn: values and all gradients, as in the contract."""

import hypothesis
import hypothesis.strategies as st
import pytest
from contract import (
    IMPLEMENTATIONS,
    a_function_normalizes,
    bias,
    check,
    embedding_by_axis,
    extra_tokens,
    key_embedding,
    mask_by_slot,
    mask_of_keys,
    normalize,
    part_of_the_queries,
    positions_of_extra_tokens,
    problem,
    relative_bias,
    residuals,
    scale,
    score_mod,
    segments,
    sinks,
    soft_cap,
    with_,
)
from tiers import examples
from windows import grids

BY_AXIS = [embedding_by_axis, with_(embedding_by_axis, (1, None)), with_(embedding_by_axis, dims=(2, 1))]


def causal_extra_tokens(p):
    extra_tokens(p)
    positions_of_extra_tokens(p)


TERMS = [bias, relative_bias]
EXTRA = [[], [extra_tokens], [causal_extra_tokens]]
PARTS = [[], [], [part_of_the_queries], [with_(part_of_the_queries, traced=True)]]
EMBEDDINGS = [[], [key_embedding], [with_(key_embedding, 1)], *([term] for term in BY_AXIS)]
OTHERS = [segments, scale, soft_cap, score_mod]
MASKS = [[], [mask_by_slot], [mask_of_keys]]
NORMALIZERS = [*(with_(normalize, name) for name in ("relu", "sigmoid", "none", "sparsemax")), a_function_normalizes]


@pytest.mark.core(1)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@examples(0.8, phases=[hypothesis.Phase.generate])
@hypothesis.given(data=st.data())
def test_drawn(implementation, data):
    rank = data.draw(st.sampled_from([1, 2]))
    geometry = data.draw(grids(rank=rank, most=14 if rank == 1 else 7, widest=5 if rank == 1 else 3))
    terms = data.draw(st.lists(st.sampled_from(TERMS + OTHERS), unique=True, max_size=5))
    terms += data.draw(st.sampled_from(EMBEDDINGS))
    masks = data.draw(st.sampled_from(MASKS))
    terms += data.draw(st.sampled_from(EXTRA))
    last = data.draw(st.sampled_from([[residuals], [residuals, sinks], *([one] for one in NORMALIZERS)]))
    part = data.draw(st.sampled_from(PARTS if a_function_normalizes not in last else PARTS[:3]))
    seed = data.draw(st.integers(0, 99))
    check(problem(geometry, [*terms, *masks, *last, *part], seed=seed), implementation)
