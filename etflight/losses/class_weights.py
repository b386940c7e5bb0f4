"""The weights of classes that a user gives, as a tensor."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor

from etflight.utils.errors import UserError


def class_weights_of(
    given: Sequence[float] | Mapping[str, float], num_classes: int, class_names: Sequence[str] | None
) -> Tensor:
    """Return explicit class weights as a tensor.

    Args:
        given: K positive, finite numbers, or such numbers by class name; a class that is not named has 1.
        num_classes: The number of classes K.
        class_names: The names of the classes, or None if unknown.

    Returns:
        `[K]`, float32.

    Raises:
        UserError: There is no such class, or its name is not known; there are too many or too few numbers; a number is not positive and
            finite.
    """
    for weight in given.values() if isinstance(given, Mapping) else given:
        if not (type(weight) in (int, float) and 1e-30 <= weight <= 1e30):
            raise UserError(f"class_weights: {weight!r} is no weight: give positive, finite numbers, 1 for no change")
    if not isinstance(given, Mapping):
        if len(given) != num_classes:
            raise UserError(f"class_weights has {len(given)} entries for {num_classes} classes: give one per class")
        return torch.tensor(given, dtype=torch.float32)
    if class_names is None:
        raise UserError(
            f"class_weights names classes, but the data have no class names: give a list of {num_classes} weights"
        )
    for name in given:
        if name not in class_names:
            near = get_close_matches(str(name), class_names)
            known = f"near matches: {', '.join(near)}" if near else f"the first are {', '.join(class_names[:5])}"
            raise UserError(f"class_weights: no class is called {name!r}; {known}")
        if (times := class_names.count(name)) > 1:
            raise UserError(f"class_weights: {times} classes are called {name!r}: give a list of {num_classes} weights")
    return torch.tensor([given.get(name, 1.0) for name in class_names], dtype=torch.float32)
