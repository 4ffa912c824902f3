"""What an optimizer starts with: this rank's part of the state of one parameter, made of its part of that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fxzero.capture.inventory import state_name
from fxzero.capture.priming import InitialStates
from fxzero.capture.rehearsal import initial_forms
from fxzero.runtime.layout import Held, Layout, Layouts


def initial_state(
    states: InitialStates, group: int, name: str, held: Held, layouts: Layouts
) -> Iterator[tuple[str, Any, Layout | None]]:
    """The state that a parameter would start with.

    Only what has another shape than the parameter is made whole, and only what lies otherwise over ep or tp than the
    parameter needs values of other ranks; then all ranks must take part.

    Args:
        states: of the optimizer.
        group: index of the parameter's group.
        name, held: of the parameter.
        layouts: of the step.

    Returns:
        Of each entry its key, this rank's memory of it and how it lies; a number, or a tensor of no dims, as it is, and
        None.
    """
    parameter, shape = held.owned, held.owned.shape
    lies = layouts.of_parameter(name, shape, stage=1)
    made = {lies: states.of(group, _part(held, lies))}
    whole: dict[str, Any] = {}
    forms = initial_forms(states, group, parameter) if layouts.may_split_state else made[lies]
    for key, form in forms.items():
        if not isinstance(form, torch.Tensor) or not form.dim():
            yield key, made[lies][key], None
            continue
        layout = layouts.of_state(state_name(name, key), form.shape, owner=shape)
        if form.shape != shape:
            whole = whole or states.of(group, held.memory.new_zeros(shape))
            yield key, layout.memory_of_whole(whole[key]), layout
            continue
        if layout not in made:
            made[layout] = states.of(group, _part(held, layout))
        yield key, layout.without_holes(made[layout][key]), layout


def _part(held: Held, layout: Layout) -> torch.Tensor:
    """This rank's memory of a parameter, if it lay so."""
    if held.layout in (None, layout):
        return held.memory
    alike = (held.layout.over_ep, held.layout.over_tp) == (layout.over_ep, layout.over_tp)
    if alike and not held.layout.as_rows:
        return layout.memory_of_part(held.memory)
    return layout.memory_of_whole(held.whole())
