"""Matrix products in every layout."""

from ._use import EinsumUse, Use, first_operand, ghost_rule


@ghost_rule("dot_general")
def dot_general(use: Use) -> EinsumUse:
    r"""$y_{b,f,g} = \sum_c P_{b,c,f} E_{b,c,g}$, so $G_{b,c,f} = \sum_g E_{b,c,g} \dot y_{b,f,g}$: $g$ is the sequence."""
    contracting, batch = use.params["dimension_numbers"]
    mine, other = use.operand, 1 - use.operand
    of_other = dict(zip(contracting[other], contracting[mine], strict=True))
    of_other |= dict(zip(batch[other], batch[mine], strict=True))
    free = [j for j in range(len(use.inputs[other].shape)) if j not in of_other]
    sequence = {j: -1 - n for n, j in enumerate(free)}
    captured_axes = tuple(of_other[j] if j in of_other else sequence[j] for j in range(len(use.inputs[other].shape)))
    kept = [j for j in range(len(use.inputs[mine].shape)) if j not in (*contracting[mine], *batch[mine])]
    others = [sequence[j] for j in free]
    # the result has the batch axes in the order of the left operand, then its free axes, then those of the right operand
    output_axes = (*batch[mine], *((*kept, *others) if mine == 0 else (*others, *kept)))
    return EinsumUse(first_operand, captured_axes, output_axes)
