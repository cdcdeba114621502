"""The solver behind all proportional rules: spend a budget, no layer over its size."""

from collections.abc import Mapping


def waterfill(
    priorities: Mapping[str, float], capacities: Mapping[str, float], budget: float
) -> dict[str, float]:
    """Solve ``amount = capacity * min(1, scale * priority)`` for the scale that spends the budget.

    The total grows with the scale and bends where a layer fills up, so filling the layers in the
    order of their priorities finds the scale in closed form.

    Args:
        priorities: wished-for densities by layer, up to a common factor, >= 0.
        capacities: the most that each layer can take, >= 0.
        budget: total to hand out.

    Returns:
        The amount of each layer; the sum is the budget up to rounding.

    Raises:
        ValueError: a priority is negative, or the layers can't take the budget.
    """
    if any(priority < 0 for priority in priorities.values()):
        raise ValueError("priorities must not be negative")
    room = sum(capacities[name] for name, priority in priorities.items() if priority > 0)
    if budget > room * (1 + 1e-12) or budget < 0:
        raise ValueError(f"budget {budget:g} lies outside [0, {room:g}], what the layers can take")
    order = sorted((n for n in priorities if priorities[n] > 0), key=lambda n: -priorities[n])
    amounts = dict.fromkeys(priorities, 0.0)
    left = float(budget)
    for position, name in enumerate(order):
        rest = order[position:]
        scale = left / sum(priorities[n] * capacities[n] for n in rest)
        if scale * priorities[name] < 1:  # then none of the rest fills up either
            return amounts | {n: scale * priorities[n] * capacities[n] for n in rest}
        amounts[name] = float(capacities[name])
        left = max(0.0, left - capacities[name])
    return amounts
